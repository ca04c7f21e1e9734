"""The parts of limits per month that were reported to webhooks."""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "budget_notices",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenants.id", name="budget_notices_tenant_id_fkey"), nullable=False),
        sa.Column("owner_id", sa.Text(), nullable=False),
        sa.Column("month", sa.Date(), nullable=False),
        sa.Column("limit", sa.Text(), nullable=False),
        sa.Column("percent", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "owner_id", "month", "limit", "percent", name="budget_notices_pkey"),
    )


def downgrade() -> None:
    op.drop_table("budget_notices")
