"""Audit records name their actor and their request."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Nullable, without defaults: the table is not rewritten, and the running release continues without them.
    op.add_column("audit_log", sa.Column("actor", sa.Text(), nullable=True))
    op.add_column("audit_log", sa.Column("request_id", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("audit_log", "request_id")
    op.drop_column("audit_log", "actor")
