"""Webhooks and the deliveries of events to them."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "webhooks",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenants.id", name="webhooks_tenant_id_fkey"), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("event_types", postgresql.ARRAY(sa.Text()), nullable=True),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("secret_hint", sa.Text(), nullable=False),
        sa.Column("previous_secret", sa.LargeBinary(), nullable=True),
        sa.Column("previous_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("failing_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("disabled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("disabled_reason", sa.Text(), nullable=True),
        sa.Column("dropped_events", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name="webhooks_pkey"),
    )
    # Gateways replace the key of signatures without the right to read it, so the earlier one is kept here.
    op.execute(
        """
        CREATE FUNCTION keep_webhook_secret() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
        BEGIN
          NEW.previous_secret := OLD.secret;
          RETURN NEW;
        END
        $$
        """
    )
    op.execute("CREATE TRIGGER keep_webhook_secret BEFORE UPDATE OF secret ON webhooks FOR EACH ROW EXECUTE FUNCTION keep_webhook_secret()")
    op.create_table(
        "webhook_deliveries",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("webhook_id", sa.Text(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.Text(), server_default=sa.text("'pending'"), nullable=False),
        sa.Column("failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("attempted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("duration_ms", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("due_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("runner_id", sa.Text(), nullable=True),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "webhook_id", "id", name="webhook_deliveries_pkey"),
        sa.ForeignKeyConstraint(
            ["tenant_id", "webhook_id"],
            ["webhooks.tenant_id", "webhooks.id"],
            name="webhook_deliveries_tenant_id_fkey",
            ondelete="CASCADE",
        ),
    )
    pending, leased = sa.text("state = 'pending'"), sa.text("runner_id IS NOT NULL")
    due = sa.text("state = 'pending' AND runner_id IS NULL")
    op.create_index("webhook_deliveries_pending_idx", "webhook_deliveries", ["tenant_id", "webhook_id", "due_at"], postgresql_where=pending)
    op.create_index("webhook_deliveries_due_idx", "webhook_deliveries", ["due_at"], postgresql_where=due)
    op.create_index("webhook_deliveries_leased_idx", "webhook_deliveries", ["runner_id"], postgresql_where=leased)
    op.create_index(
        "webhook_deliveries_tenant_id_webhook_id_created_at_idx", "webhook_deliveries", ["tenant_id", "webhook_id", "created_at"]
    )
    op.create_index("webhook_deliveries_ended_idx", "webhook_deliveries", ["ended_at"], postgresql_where=sa.text("ended_at IS NOT NULL"))


def downgrade() -> None:
    op.drop_table("webhook_deliveries")
    op.drop_table("webhooks")
    op.execute("DROP FUNCTION keep_webhook_secret()")
