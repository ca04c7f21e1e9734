"""Adapters record the role that made their version live, so that `lmaas apply` does not undo a tenant's own change."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Nullable, without a default: the table is not rewritten, and the running release continues without it.
    op.add_column("adapters", sa.Column("activated_by", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("adapters", "activated_by")
