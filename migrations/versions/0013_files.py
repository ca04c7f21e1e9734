"""Files of tenants."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "files",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenants.id", name="files_tenant_id_fkey"), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("tenant_id", "id", name="files_pkey"),
    )
    op.create_index("files_expires_at_idx", "files", ["expires_at"])
    op.create_index("files_tenant_id_created_at_id_idx", "files", ["tenant_id", "created_at", "id"])
    op.create_index("files_tenant_id_sha256_idx", "files", ["tenant_id", "sha256"])
    op.create_table(
        "content_checks",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenants.id", name="content_checks_tenant_id_fkey"), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name="content_checks_pkey"),
    )
    op.create_index("content_checks_due_at_idx", "content_checks", ["due_at"])


def downgrade() -> None:
    op.drop_table("content_checks")
    op.drop_table("files")
