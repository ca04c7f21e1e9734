"""Batches record how many runners were lost while they validated or finalized them."""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # A constant default does not rewrite the table, and the running release continues without the column.
    op.add_column("batches", sa.Column("losses", sa.Integer(), nullable=False, server_default=sa.text("0")))


def downgrade() -> None:
    op.drop_column("batches", "losses")
