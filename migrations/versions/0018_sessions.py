"""Keys may expire, and sessions are keys that end with the key from which they were made."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Nullable, without defaults: the table is not rewritten, and the running release continues without them.
    op.add_column("api_keys", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("api_keys", sa.Column("parent_id", sa.Text(), sa.ForeignKey("api_keys.id"), nullable=True))
    op.create_index("api_keys_sessions", "api_keys", ["parent_id", "created_at"], postgresql_where=sa.text("parent_id IS NOT NULL"))


def downgrade() -> None:
    # The older release would treat sessions as keys that never end.
    op.execute("DELETE FROM api_keys WHERE parent_id IS NOT NULL")
    op.drop_index("api_keys_sessions", table_name="api_keys")
    op.drop_column("api_keys", "parent_id")
    op.drop_column("api_keys", "expires_at")
