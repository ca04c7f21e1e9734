"""The time of each replica's start by stage."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("replicas", sa.Column("start", postgresql.JSONB(), nullable=True))


def downgrade() -> None:
    op.drop_column("replicas", "start")
