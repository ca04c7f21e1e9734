"""Base models have a kind: their engines generate text, or embed it."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # A constant default does not rewrite the table, and the running release continues without the column.
    op.add_column("base_models", sa.Column("kind", sa.Text(), nullable=False, server_default=sa.text("'generate'")))


def downgrade() -> None:
    op.drop_column("base_models", "kind")
