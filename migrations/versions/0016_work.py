"""The ledger records the class of the work."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # A constant default does not rewrite the table, and the running release continues without the column.
    op.add_column("usage_events", sa.Column("work", sa.Text(), nullable=False, server_default=sa.text("'interactive'")))


def downgrade() -> None:
    op.drop_column("usage_events", "work")
