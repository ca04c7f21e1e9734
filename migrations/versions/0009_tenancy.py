"""Requirements of row-level security: each version's own tenant, and a counter of changes that no process writes by itself.

Policies, roles and rights are not in here: after the migrations, `lmaas migrate` sets them as lmaas/store/rights.py lists them.
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Nullable at first: no table is rewritten.
    op.add_column("adapter_versions", sa.Column("tenant_id", sa.Text(), nullable=True))
    # The release before does not know the column, and continues while this one starts.
    op.execute(
        """
        CREATE FUNCTION version_tenant() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
        BEGIN
          SELECT tenant_id INTO NEW.tenant_id FROM adapters WHERE id = NEW.adapter_id;
          RETURN NEW;
        END
        $$
        """
    )
    op.execute(
        "CREATE TRIGGER version_tenant BEFORE INSERT ON adapter_versions FOR EACH ROW "
        "WHEN (NEW.tenant_id IS NULL) EXECUTE FUNCTION version_tenant()"
    )
    op.execute("UPDATE adapter_versions SET tenant_id = adapters.tenant_id FROM adapters WHERE adapters.id = adapter_id")
    op.alter_column("adapter_versions", "tenant_id", nullable=False)
    op.create_unique_constraint(op.f("adapters_id_tenant_id_key"), "adapters", ["id", "tenant_id"])
    op.drop_constraint(op.f("adapter_versions_adapter_id_fkey"), "adapter_versions", type_="foreignkey")
    op.create_foreign_key(
        op.f("adapter_versions_adapter_id_fkey"),
        "adapter_versions",
        "adapters",
        ["adapter_id", "tenant_id"],
        ["id", "tenant_id"],
        ondelete="CASCADE",
    )
    # The trigger writes as the owner of the table: no process needs a right on it.
    op.execute("ALTER FUNCTION note_change() SECURITY DEFINER SET search_path = public, pg_temp")
    op.execute("REVOKE EXECUTE ON FUNCTION note_change() FROM PUBLIC")


def downgrade() -> None:
    op.execute("GRANT EXECUTE ON FUNCTION note_change() TO PUBLIC")
    op.execute("ALTER FUNCTION note_change() SECURITY INVOKER RESET search_path")
    op.drop_constraint(op.f("adapter_versions_adapter_id_fkey"), "adapter_versions", type_="foreignkey")
    op.create_foreign_key(
        op.f("adapter_versions_adapter_id_fkey"), "adapter_versions", "adapters", ["adapter_id"], ["id"], ondelete="CASCADE"
    )
    op.drop_constraint(op.f("adapters_id_tenant_id_key"), "adapters", type_="unique")
    op.execute("DROP TRIGGER version_tenant ON adapter_versions")
    op.execute("DROP FUNCTION version_tenant()")
    op.drop_column("adapter_versions", "tenant_id")
