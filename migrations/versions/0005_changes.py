"""A number that grows with every change of a table that gateways cache."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

#: The tables that gateways cache.
WATCHED = ("tenants", "api_keys", "base_models", "adapters", "adapter_versions")


def upgrade() -> None:
    op.create_table(
        "changes",
        sa.Column("slot", sa.BigInteger(), autoincrement=True, nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("slot", name=op.f("changes_pkey")),
    )
    op.execute("INSERT INTO changes (number) SELECT 0 FROM generate_series(1, 16)")
    # The number is the sum of all rows: a transaction adds to one that no other holds, so that none waits for another here, which could
    # be a deadlock. Committed changes are always in the sum, in whichever order they were made.
    op.execute(
        """
        CREATE FUNCTION note_change() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
          UPDATE changes SET number = number + 1 WHERE slot = (SELECT slot FROM changes LIMIT 1 FOR UPDATE SKIP LOCKED);
          IF NOT FOUND THEN
            INSERT INTO changes (number) VALUES (1);
          END IF;
          RETURN NULL;
        END
        $$
        """
    )
    for table in WATCHED:
        op.execute(
            f"CREATE TRIGGER note_change AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION note_change()"
        )


def downgrade() -> None:
    for table in WATCHED:
        op.execute(f"DROP TRIGGER note_change ON {table}")
    op.execute("DROP FUNCTION note_change()")
    op.drop_table("changes")
