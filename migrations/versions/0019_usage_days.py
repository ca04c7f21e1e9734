"""Daily sums of the ledger, which triggers keep exact, and those of the existing events."""

from datetime import date, timedelta

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

DAY_KEY = ("tenant_id", "day", "key_id", "base_model", "adapter", "work", "status", "code", "slot")
DAY_SUMS = ("requests", "unpriced", "prompt_tokens", "cached_tokens", "completion_tokens", "run_ms", "charge_picousd")
WORK_KEY = ("replica_id", "day", "tenant_id", "base_model", "adapter", "work", "slot")
WORK_SUMS = ("run_ms", "load_ms")
#: The columns of the sums, of rows of the ledger called `event`. `times` is empty, or multiplies by their `sign`: -1 for a row that was
#: replaced.
DAY_ROW = """
    event.tenant_id, (event.created_at AT TIME ZONE 'UTC')::date AS day, event.key_id, event.base_model,
    CASE WHEN event.adapter IS NOT NULL THEN split_part(event.model, '@', 1) END AS adapter, event.work, event.status,
    CASE WHEN event.status = 'wasted' THEN event.code END AS code, {slot} AS slot, sum({times} 1) AS requests,
    sum({times} 1) FILTER (
        WHERE event.charge_picousd = 0 AND event.prompt_tokens + event.completion_tokens > 0
        AND event.status IN ('completed', 'aborted', 'failed', 'lost')
    ) AS unpriced,
    sum({times} event.prompt_tokens) AS prompt_tokens, sum({times} event.cached_tokens) AS cached_tokens,
    sum({times} event.completion_tokens) AS completion_tokens, sum({times} event.run_ms) AS run_ms,
    sum({times} event.charge_picousd) AS charge_picousd
"""
STARTED = "((event.created_at + (event.queue_ms + event.load_ms) * interval '1 millisecond') AT TIME ZONE 'UTC')::date"
WORK_ROW = f"""
    event.replica_id, {STARTED} AS day, event.tenant_id, event.base_model,
    CASE WHEN event.adapter IS NOT NULL THEN split_part(event.model, '@', 1) END AS adapter, event.work, {{slot}} AS slot,
    sum({{times}} event.run_ms) AS run_ms, sum({{times}} event.load_ms) AS load_ms
"""
IS_WORK = "event.replica_id IS NOT NULL AND event.tenant_id IS NOT NULL"
ADDED = "added AS event"
BY_SIGN, ONCE = "event.sign *", ""
CHANGED = "(SELECT 1 AS sign, * FROM added UNION ALL SELECT -1, * FROM removed) AS event"
#: The slots. A transaction in the scope of a tenant, such as a job runner's, may hold the sums of one tenant while it waits for an event of
#: the next, so it uses other rows than the metering writer, which stores the events of all tenants before any sum. New and replaced
#: events of one statement are added to the sums one after the other, so these use different rows as well.
SLOT = "(CASE WHEN coalesce(current_setting('lmaas.tenant', true), '') = '' THEN {} ELSE {} END)::smallint"
A_DAY = timedelta(days=1)


def upgrade() -> None:
    connection = op.get_bind()
    if connection.execute(sa.text("SELECT to_regclass('usage_days')")).scalar() is None:
        _create()
    # From here on, every new event is counted. The older ones are counted day by day, in a transaction for each, so that no event has to
    # wait for long. If this stops half way, the next attempt continues.
    with op.get_context().autocommit_block():
        _fill(connection)
    op.drop_table("usage_fill")


def _create() -> None:
    counts = [sa.Column(name, sa.BigInteger(), nullable=False) for name in DAY_SUMS[:-1]]
    op.create_table(
        "usage_days",
        sa.Column("tenant_id", sa.Text(), nullable=True),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=True),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("adapter", sa.Text(), nullable=True),
        sa.Column("work", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("code", sa.Text(), nullable=True),
        sa.Column("slot", sa.SmallInteger(), nullable=False),
        *counts,
        sa.Column("charge_picousd", sa.Numeric(), nullable=False),
    )
    op.create_table(
        "work_days",
        sa.Column("replica_id", sa.Text(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("adapter", sa.Text(), nullable=True),
        sa.Column("work", sa.Text(), nullable=False),
        sa.Column("slot", sa.SmallInteger(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in WORK_SUMS),
    )
    # Rows of today change often. With room in their pages, a change needs no new entry in an index.
    for table, key in (("usage_days", DAY_KEY), ("work_days", WORK_KEY)):
        op.execute(f"ALTER TABLE {table} SET (fillfactor = 60)")
        op.create_index(f"{table}_key", table, key, unique=True, postgresql_nulls_not_distinct=True)
    op.create_index("usage_days_day_idx", "usage_days", ["day"])
    op.create_table("usage_fill", sa.Column("day", sa.Date(), nullable=False))
    _create_trigger("count_usage", "AFTER INSERT", "NEW TABLE AS added", ADDED, ONCE, SLOT.format(0, 2))
    _create_trigger("recount_usage", "AFTER UPDATE", "OLD TABLE AS removed NEW TABLE AS added", CHANGED, BY_SIGN, SLOT.format(1, 3))


def _create_trigger(name: str, when: str, tables: str, source: str, times: str, slot: str) -> None:
    op.execute(
        f"""
        CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
        BEGIN
          IF NOT EXISTS (SELECT FROM added) THEN
            RETURN NULL;
          END IF;
          {_adding("usage_days", DAY_KEY, DAY_SUMS, DAY_ROW.format(times=times, slot=slot), source)};
          {_adding("work_days", WORK_KEY, WORK_SUMS, WORK_ROW.format(times=times, slot=slot), f"{source} WHERE {IS_WORK}")};
          RETURN NULL;
        END
        $$
        """
    )
    op.execute(f"REVOKE EXECUTE ON FUNCTION {name}() FROM PUBLIC")
    op.execute(f"CREATE TRIGGER {name} {when} ON usage_events REFERENCING {tables} FOR EACH STATEMENT EXECUTE FUNCTION {name}()")


def _adding(table: str, key: tuple[str, ...], sums: tuple[str, ...], row: str, source: str) -> str:
    """Return the statement that adds the sums of events to the rows of a table, which it locks in one order."""
    places = ", ".join(str(number) for number in range(1, len(key) + 1))
    return f"""
        INSERT INTO {table} AS known ({", ".join((*key, *sums))})
        SELECT {", ".join(key)}, {", ".join(f"coalesce({name}, 0)" for name in sums)} FROM (
            SELECT {row} FROM {source} GROUP BY {places}
        ) AS summed ORDER BY {places}
        ON CONFLICT ({", ".join(key)}) DO UPDATE SET {", ".join(f"{name} = known.{name} + excluded.{name}" for name in sums)}
    """  # noqa: S608 (names of columns)


def _fill(connection: sa.Connection) -> None:
    """Count the events of each day, and the work that started on it: no request waits for more than a day."""
    day = date.min
    while True:
        first = sa.text(
            "SELECT min((created_at AT TIME ZONE 'UTC')::date) FROM usage_events WHERE created_at >= CAST(:first AS timestamptz)"
        )
        arrived = connection.execute(first, {"first": f"{max(day, date.min + A_DAY) - A_DAY} 00:00+00"}).scalar()
        if arrived is None:
            return
        day = max(day, arrived)
        if not connection.execute(sa.text("SELECT count(*) FROM usage_fill WHERE day = :day"), {"day": day}).scalar_one():
            op.execute(_counting(day))
        day += A_DAY


def _counting(day: date) -> str:
    """Return the statement that counts the events of one day anew. Until it has ended, new events wait."""
    arrived = "SELECT * FROM usage_events WHERE created_at >= '{} 00:00+00' AND created_at < '{} 00:00+00'"
    of_day, of_two = arrived.format(day, day + A_DAY), arrived.format(day - A_DAY, day + A_DAY)
    return f"""
        DO $$
        BEGIN
          -- For so few rows, compiling a plan takes longer than the plan.
          PERFORM set_config('jit', 'off', true);
          LOCK TABLE usage_events IN SHARE MODE;
          DELETE FROM usage_days WHERE day = '{day}';
          DELETE FROM work_days WHERE day = '{day}';
          {_adding("usage_days", DAY_KEY, DAY_SUMS, DAY_ROW.format(times=ONCE, slot="0::smallint"), f"({of_day}) AS event")};
          {
        _adding(
            "work_days",
            WORK_KEY,
            WORK_SUMS,
            WORK_ROW.format(times=ONCE, slot="0::smallint"),
            f"({of_two}) AS event WHERE {IS_WORK} AND {STARTED} = '{day}'",
        )
    };
          INSERT INTO usage_fill (day) VALUES ('{day}');
        END
        $$
    """  # noqa: S608 (days)


def downgrade() -> None:
    for name in ("recount_usage", "count_usage"):
        op.execute(f"DROP TRIGGER {name} ON usage_events")
        op.execute(f"DROP FUNCTION {name}()")
    op.drop_table("work_days")
    op.drop_table("usage_days")
