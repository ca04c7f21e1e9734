"""Stored responses and conversations of OpenAI's Responses API."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "responses",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenants.id", name="responses_tenant_id_fkey"), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("previous_id", sa.Text(), nullable=True),
        sa.Column("conversation_id", sa.Text(), nullable=True),
        sa.Column("conversation_start", sa.BigInteger(), nullable=True),
        sa.Column("input", sa.LargeBinary(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("output_start", sa.Integer(), nullable=False),
        sa.Column("output_bytes", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name="responses_pkey"),
    )
    op.create_index("responses_expires_at_idx", "responses", ["expires_at"])
    op.create_table(
        "conversations",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenants.id", name="conversations_tenant_id_fkey"), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("metadata", sa.LargeBinary(), nullable=False),
        sa.Column("next_position", sa.BigInteger(), nullable=False),
        sa.Column("item_count", sa.BigInteger(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name="conversations_pkey"),
    )
    op.create_index("conversations_expires_at_idx", "conversations", ["expires_at"])
    op.create_table(
        "conversation_items",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("conversation_id", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "conversation_id", "position", name="conversation_items_pkey"),
        sa.ForeignKeyConstraint(
            ["tenant_id", "conversation_id"],
            ["conversations.tenant_id", "conversations.id"],
            name="conversation_items_tenant_id_fkey",
            ondelete="CASCADE",
        ),
    )
    op.create_index("conversation_items_tenant_id_id_idx", "conversation_items", ["tenant_id", "id"])


def downgrade() -> None:
    op.drop_table("conversation_items")
    op.drop_table("conversations")
    op.drop_table("responses")
