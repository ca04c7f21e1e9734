"""What a replica of a base model takes from its machine."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Nullable, without defaults: no table is rewritten, and the running release goes on without them.
    op.add_column("base_models", sa.Column("cpus", sa.Float(), nullable=True))
    op.add_column("base_models", sa.Column("accelerators", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("base_models", "accelerators")
    op.drop_column("base_models", "cpus")
