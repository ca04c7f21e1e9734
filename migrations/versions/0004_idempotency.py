"""Idempotency keys: the requests that ran, and their responses for a day."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "idempotency",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("body_hash", sa.LargeBinary(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("content_type", sa.Text(), nullable=True),
        sa.Column("answer", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("idempotency_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("tenant_id", "key", name=op.f("idempotency_pkey")),
    )
    op.create_index(op.f("idempotency_state_seen_at_idx"), "idempotency", ["state", "seen_at"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("idempotency_state_seen_at_idx"), table_name="idempotency")
    op.drop_table("idempotency")
