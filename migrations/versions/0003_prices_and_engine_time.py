"""Prices of base models, charges in the ledger, and the time of each engine in each phase."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

PRICES = ("prompt_price", "cached_price", "completion_price", "engine_price")


def upgrade() -> None:
    # Columns with constant defaults: no table is rewritten, and the running release continues without them.
    for name in PRICES:
        op.add_column("base_models", sa.Column(name, sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.add_column("usage_events", sa.Column("charge_picousd", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.create_table(
        "engine_time",
        sa.Column("replica_id", sa.Text(), nullable=False),
        sa.Column("base_model_id", sa.Text(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("phase", sa.Text(), nullable=False),
        sa.Column("price", sa.BigInteger(), nullable=False),
        sa.Column("ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["base_model_id"], ["base_models.id"], name=op.f("engine_time_base_model_id_fkey")),
        sa.ForeignKeyConstraint(["replica_id"], ["replicas.id"], name=op.f("engine_time_replica_id_fkey")),
        sa.PrimaryKeyConstraint("replica_id", "day", "phase", "price", name=op.f("engine_time_pkey")),
    )
    op.create_index(op.f("engine_time_day_idx"), "engine_time", ["day"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("engine_time_day_idx"), table_name="engine_time")
    op.drop_table("engine_time")
    op.drop_column("usage_events", "charge_picousd")
    for name in reversed(PRICES):
        op.drop_column("base_models", name)
