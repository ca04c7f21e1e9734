"""Responses that run in the background."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "background_responses",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenants.id", name="background_responses_tenant_id_fkey"), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("previous_id", sa.Text(), nullable=True),
        sa.Column("conversation_id", sa.Text(), nullable=True),
        sa.Column("request", sa.LargeBinary(), nullable=False),
        sa.Column("input", sa.LargeBinary(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("is_streamed", sa.Boolean(), nullable=False),
        sa.Column("first_event", sa.Integer(), server_default=sa.text("2"), nullable=False),
        sa.Column("next_event", sa.Integer(), server_default=sa.text("2"), nullable=False),
        sa.Column("is_log_whole", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("losses", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("not_before", sa.DateTime(timezone=True), nullable=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("runner_id", sa.Text(), nullable=True),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("tenant_id", "id", name="background_responses_pkey"),
    )
    op.create_index("background_responses_expires_at_idx", "background_responses", ["expires_at"])
    op.create_index(
        "background_responses_open_idx",
        "background_responses",
        ["tenant_id", "created_at"],
        postgresql_where=sa.text("ended_at IS NULL"),
    )
    op.create_index(
        "background_responses_leased_idx", "background_responses", ["runner_id"], postgresql_where=sa.text("runner_id IS NOT NULL")
    )
    op.create_table(
        "response_events",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("response_id", sa.Text(), nullable=False),
        sa.Column("first", sa.Integer(), nullable=False),
        sa.Column("last", sa.Integer(), nullable=False),
        sa.Column("events", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "response_id", "first", name="response_events_pkey"),
        sa.ForeignKeyConstraint(
            ["tenant_id", "response_id"],
            ["background_responses.tenant_id", "background_responses.id"],
            name="response_events_tenant_id_fkey",
            ondelete="CASCADE",
        ),
    )


def downgrade() -> None:
    op.drop_table("response_events")
    op.drop_table("background_responses")
