"""Pools: the part of a machine that a replica takes, deleted base models, and the controller's latest decision."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Nullable, without defaults: no table is rewritten, and the running release continues without them.
    op.add_column("base_models", sa.Column("cpus", sa.Float(), nullable=True))
    op.add_column("base_models", sa.Column("accelerators", sa.Integer(), nullable=True))
    op.add_column("base_models", sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True))
    # A deleted base model stays for the bill; its name can be used again.
    op.drop_constraint("base_models_name_key", "base_models", type_="unique")
    op.create_index("base_models_name_key", "base_models", ["name"], unique=True, postgresql_where=sa.text("deleted_at IS NULL"))
    op.create_table(
        "pool_states",
        sa.Column("base_model_id", sa.Text(), nullable=False),
        sa.Column("decision", postgresql.JSONB(), nullable=False),
        sa.Column("idle_times", postgresql.JSONB(), nullable=False),
        sa.Column("decided_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["base_model_id"], ["base_models.id"], name=op.f("pool_states_base_model_id_fkey")),
        sa.PrimaryKeyConstraint("base_model_id", name=op.f("pool_states_pkey")),
    )


def downgrade() -> None:
    op.drop_table("pool_states")
    op.drop_index("base_models_name_key", "base_models")
    op.create_unique_constraint("base_models_name_key", "base_models", ["name"])
    op.drop_column("base_models", "deleted_at")
    op.drop_column("base_models", "accelerators")
    op.drop_column("base_models", "cpus")
