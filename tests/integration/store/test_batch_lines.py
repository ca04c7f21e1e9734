"""The storage of batch lines' ends and results, with the rights of a job runner."""

import asyncio
import dataclasses
import random
from collections import Counter
from datetime import timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from lmaas.states import UsageStatus
from lmaas.store.backlog import done_tokens
from lmaas.store.batch_lines import (
    MAX_ANSWER_BYTES,
    MAX_ESTIMATE,
    TOO_LARGE,
    EndedLine,
    NewLine,
    add_lines,
    delete_lines,
    end_lines,
    results,
)
from lmaas.store.conversations import Item, NewTurn, create_conversation, find_context
from lmaas.store.database import Database
from lmaas.store.line_leases import (
    LeasedLine,
    claim_lines,
    give_back_lines,
    settle,
    stop_batch,
)
from lmaas.store.responses import Response
from lmaas.store.rights import DatabaseRole
from lmaas.store.runners import BatchLease, LeaseLost, end, register
from lmaas.store.scopes import OPERATOR, SYSTEM
from lmaas.store.tenants import create_tenant
from lmaas.store.usage import list_events, record_events
from tests.support.batches import batch_row, ended, line_rows, make_batch, pending, some_lines, usage_event
from tests.support.databases import login_url

POOL = "mod_1"
DAY = timedelta(days=1)


async def test_the_end_of_a_line_its_event_and_the_counts_are_one(db: Database, jobs_db: Database, tenant_id: str) -> None:
    batch_id = await make_batch(db, tenant_id, some_lines(3, POOL))
    runner_id = await register(jobs_db)
    leases = await claim_lines(jobs_db, runner_id, POOL, {(tenant_id, batch_id): 3})
    # The stand-in of an attempt has arrived before its own event.
    stand_in = ended(leases[0])
    await record_events(db, [usage_event(stand_in.request_id or "", tenant_id, status=UsageStatus.WASTED, charge_picousd=0)])
    group = [stand_in, ended(leases[1]), ended(leases[2], state="failed", event=False, answer=b'{"error": {}}')]
    await end_lines(jobs_db, runner_id, group)
    await end_lines(jobs_db, runner_id, group)  # as after a lost connection: no effect
    row = await batch_row(db, batch_id)
    assert (row.completed, row.failed, row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (2, 1, 10, 4, 14)
    assert row.status == "finalizing"
    assert row.finalizing_at is not None
    events = await list_events(db, OPERATOR)
    assert sorted((event.request_id, event.status, event.charge_picousd, event.work) for event in events) == sorted(
        (line.request_id, UsageStatus.COMPLETED, 12, "background") for line in group[:2]
    )
    lines = await line_rows(db, batch_id)
    assert [(line.state, line.status_code, line.runner_id) for line in lines] == [
        ("done", 200, None),
        ("done", 200, None),
        ("failed", 400, None),
    ]
    assert lines[0].answer == b'{"ok": true}'


async def test_the_response_of_a_line_is_stored_with_its_end_or_not_at_all(db: Database, jobs_db: Database, tenant_id: str) -> None:
    other = (await create_tenant(db, "other", "standard", 64, 10)).id
    batch_id, without = await make_batch(db, tenant_id, some_lines(5, POOL)), await make_batch(db, other, some_lines(1, POOL))
    for conversation_id in ("conv_1", "conv_2"):
        await create_conversation(db, tenant_id, conversation_id, b"{}", [], DAY)
    runner_id = await register(jobs_db)
    leases = await claim_lines(jobs_db, runner_id, POOL, {(tenant_id, batch_id): 5, (other, without): 1})
    own = [lease for lease in leases if lease.tenant_id == tenant_id]

    def end_of(lease: LeasedLine, conversation_id: str | None) -> EndedLine:
        name = f"{lease.position}_{lease.attempt}"
        body = b'{"output": []}'
        items = [Item(f"msg_{name}", b'{"id": "msg_%b"}' % name.encode())] if conversation_id else []
        turn = NewTurn(Response(f"resp_{name}", b"[]", body, None, 11, 2), conversation_id, items, DAY)
        return dataclasses.replace(ended(lease), turn=turn)

    await give_back_lines(jobs_db, runner_id, own[4:])
    [again] = await claim_lines(jobs_db, runner_id, POOL, {(tenant_id, batch_id): 1})
    group = [
        *(
            end_of(lease, conversation_id)
            for lease, conversation_id in zip(own, ("conv_2", None, "conv_1", "conv_2", "conv_1"), strict=True)
        ),
        *(ended(lease) for lease in leases if lease.tenant_id == other),
    ]
    await end_lines(jobs_db, runner_id, group)
    await end_lines(jobs_db, runner_id, group)  # as after a lost connection: no effect
    assert [line.state for line in await line_rows(db, batch_id)] == ["done"] * 4 + ["running"]
    assert (await batch_row(db, without)).completed == 1

    async def stored() -> tuple[set[str], list[list[bytes]]]:
        async with db.begin(SYSTEM) as connection:
            ids = {row.id for row in await connection.execute(text("SELECT id FROM responses"))}
        return ids, [await find_context(db, tenant_id, conversation_id) for conversation_id in ("conv_1", "conv_2")]

    ids, items = await stored()
    assert ids == {"resp_0_1", "resp_1_1", "resp_2_1", "resp_3_1"}, "not the use of the old lease"
    assert items == [[b'{"id": "msg_2_1"}'], [b'{"id": "msg_0_1"}', b'{"id": "msg_3_1"}']]
    await end_lines(jobs_db, runner_id, [end_of(again, "conv_1")])
    ids, items = await stored()
    assert len(ids) == 5
    assert items[0] == [b'{"id": "msg_2_1"}', b'{"id": "msg_4_2"}']
    assert len(await list_events(db, OPERATOR)) == 6


async def test_what_counts_as_done_are_estimates_that_real_tokens_bear_out(
    db: Database, jobs_db: Database, controller_db: Database, tenant_id: str
) -> None:
    """A tenant's limits must not make a pool look faster than it is, or other tenants' batches would miss their deadlines."""
    estimates = [10, 10**9, 10**9, 10**9, 10**9]
    lines = [line._replace(tokens=tokens) for line, tokens in zip(some_lines(5, POOL), estimates, strict=True)]
    batch_id = await make_batch(db, tenant_id, [*lines, *some_lines(1, "mod_2")])
    runner_id = await register(jobs_db)
    # Lines that are leased and given back, or refused, are not work of an engine.
    leases = await claim_lines(jobs_db, runner_id, POOL, {(tenant_id, batch_id): 5})
    await give_back_lines(jobs_db, runner_id, leases[4:])
    refused = [ended(leases[2], state="failed"), ended(leases[3], state="failed", event=False)]
    await end_lines(jobs_db, runner_id, refused)
    assert await done_tokens(controller_db) == {POOL: {batch_id: 0}, "mod_2": {batch_id: 0}}
    group = [ended(leases[0]), ended(leases[1])]
    for _ in range(2):
        await end_lines(jobs_db, runner_id, group)
        assert await done_tokens(controller_db) == {POOL: {batch_id: 10 + MAX_ESTIMATE * (5 + 7)}, "mod_2": {batch_id: 0}}


async def test_a_batch_whose_answers_are_too_large_stops(db: Database, jobs_db: Database, tenant_id: str) -> None:
    one, two = [await make_batch(db, tenant_id, some_lines(count, POOL)) for count in (3, 1)]
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE batches SET answer_bytes = :bytes"), {"bytes": MAX_ANSWER_BYTES - 15})
    runner_id = await register(jobs_db)
    first, second, _ = await claim_lines(jobs_db, runner_id, POOL, {(tenant_id, one): 3})
    await end_lines(jobs_db, runner_id, [ended(first)])
    assert (await batch_row(db, one)).stop_code is None
    await end_lines(jobs_db, runner_id, [ended(second)])
    row = await batch_row(db, one)
    assert (row.status, row.stop_code, row.completed) == ("in_progress", TOO_LARGE, 2)
    assert "Send the requests that were not run in another batch." in row.stop_message
    # After its last line, a batch has nothing left to stop.
    [last] = await claim_lines(jobs_db, runner_id, POOL, {(tenant_id, two): 1})
    await end_lines(jobs_db, runner_id, [ended(last, answer=b"x" * 20)])
    row = await batch_row(db, two)
    assert (row.status, row.stop_code, row.answer_bytes) == ("finalizing", None, MAX_ANSWER_BYTES + 5)


async def test_an_event_replaces_no_other_tenants(db: Database, jobs_db: Database, tenant_id: str) -> None:
    other = (await create_tenant(db, "other", "standard", 64, 10)).id
    batches = {one: await make_batch(db, one, some_lines(1, POOL)) for one in (tenant_id, other)}
    runner_id = await register(jobs_db)
    leases = await claim_lines(jobs_db, runner_id, POOL, dict.fromkeys(batches.items(), 1))
    await end_lines(jobs_db, runner_id, [ended(lease) for lease in leases])
    assert {event.tenant_id for event in await list_events(db, OPERATOR)} == {tenant_id, other}
    assert {(await batch_row(db, batch_id)).completed for batch_id in batches.values()} == {1}


@pytest.mark.parametrize("how", ["another attempt", "another runner"])
async def test_an_old_lease_writes_nothing(db: Database, jobs_db: Database, tenant_id: str, how: str) -> None:
    batch_id = await make_batch(db, tenant_id, some_lines(1, POOL))
    one, two = await register(jobs_db), await register(jobs_db)
    [old] = await claim_lines(jobs_db, one, POOL, {(tenant_id, batch_id): 1})
    await give_back_lines(jobs_db, one, [old])
    [new] = await claim_lines(jobs_db, one if how == "another attempt" else two, POOL, {(tenant_id, batch_id): 1})
    assert (new.attempt, new.given_back) == (2, 1)
    await end_lines(jobs_db, one, [ended(old)])
    await give_back_lines(jobs_db, one, [old])
    [line] = await line_rows(db, batch_id)
    assert (line.state, line.attempt, line.given_back) == ("running", 2, 1)
    assert await list_events(db, OPERATOR) == []
    assert (await batch_row(db, batch_id)).completed == 0
    assert await pending(db, batch_id) == {POOL: (0, 0)}


async def test_results_come_in_portions_and_go(db: Database, jobs_db: Database, tenant_id: str) -> None:
    wrong = NewLine(9, 0, 5, "wrong", None, 0, 404, b'{"error": {"code": "model_not_found"}}')
    batch_id = await make_batch(db, tenant_id, [*some_lines(1200, POOL), wrong])
    runner_id = await register(jobs_db)
    lease = BatchLease(tenant_id, batch_id, runner_id, 1)
    leases = await claim_lines(jobs_db, runner_id, POOL, {(tenant_id, batch_id): 20})
    await end_lines(jobs_db, runner_id, [ended(each, answer=b"x" * 1_000_000) for each in leases])
    portions = [portion async for portion in results(jobs_db, lease)]
    rows = [row for portion in portions for row in portion]
    assert [row.position for row in rows] == list(range(1201))
    assert max(sum(len(row.answer or b"") for row in portion) for portion in portions) <= 9_000_000
    assert Counter(row.state for row in rows) == {"done": 20, "pending": 1180, "failed": 1}
    assert (rows[-1].custom_id, rows[-1].line, rows[-1].status_code) == ("wrong", 9, 404)
    async with jobs_db.begin(tenant_id) as connection:
        await delete_lines(connection, tenant_id, batch_id)
    assert await line_rows(db, batch_id) == []
    assert await pending(db, batch_id) == {}
    await end(jobs_db, runner_id)
    with pytest.raises(LeaseLost):
        [portion async for portion in results(jobs_db, lease)]


async def test_a_batch_is_found_with_its_own_tenant_only(db: Database, jobs_db: Database, tenant_id: str) -> None:
    other = (await create_tenant(db, "other", "standard", 64, 10)).id
    batch_id = await make_batch(db, tenant_id, some_lines(2, POOL), left_s=0)
    runner_id = await register(jobs_db)
    assert not await settle(jobs_db, other, batch_id)
    await stop_batch(jobs_db, other, batch_id, "insufficient_quota", "not theirs")
    async with jobs_db.begin(other) as connection:
        await delete_lines(connection, tenant_id, batch_id)  # the scope of the transaction protects the rows that the condition names
    assert [portion async for portion in results(jobs_db, BatchLease(other, batch_id, runner_id, 1))] == []
    assert len(await line_rows(db, batch_id)) == 2
    row = await batch_row(db, batch_id)
    assert (row.status, row.stop_code) == ("in_progress", None)
    with pytest.raises(ProgrammingError, match="row-level security"):
        await make_batch_lines(jobs_db, other, tenant_id, batch_id)


async def make_batch_lines(db: Database, scope: str, tenant_id: str, batch_id: str) -> None:
    async with db.begin(scope) as connection:
        await add_lines(connection, tenant_id, batch_id, [NewLine(3, 0, 1, "more", POOL, 1)])


async def test_the_metering_writer_and_a_runner_write_the_same_events(db: Database, jobs_db: Database, tenant_id: str) -> None:
    """Both write all events of some tenants at the same time. In different orders, each could wait for the other."""
    other = (await create_tenant(db, "other", "standard", 64, 10)).id
    runner_id = await register(jobs_db)
    batches = [(one, await make_batch(db, one, some_lines(1000, POOL))) for one in (tenant_id, other)]
    for _ in range(4):
        leases = await claim_lines(jobs_db, runner_id, POOL, dict.fromkeys(batches, 250))
        lines = [ended(lease) for lease in leases]
        random.shuffle(lines)
        stand_ins = [usage_event(line.request_id or "", line.tenant_id, status=UsageStatus.WASTED) for line in lines]
        random.shuffle(stand_ins)
        await asyncio.gather(record_events(db, stand_ins), end_lines(jobs_db, runner_id, lines))
    events = await list_events(db, OPERATOR)
    assert Counter(event.status for event in events) == {UsageStatus.COMPLETED: 2000}


@pytest.mark.parametrize("statistics", ["none", "of an empty table", "of another batch"])
async def test_what_is_read_for_a_line_does_not_depend_on_statistics(
    db: Database, database_url: str, tenant_id: str, statistics: str
) -> None:
    jobs_db = Database(login_url(database_url, DatabaseRole.JOBS), DatabaseRole.JOBS, connections=1)
    runner_id = await register(jobs_db)
    for _ in range(12):  # from now on, Postgres keeps the plans
        batch_id = await make_batch(db, tenant_id, some_lines(2, POOL))
        one, two = await claim_lines(jobs_db, runner_id, POOL, {(tenant_id, batch_id): 2})
        await end_lines(jobs_db, runner_id, [ended(one)])
        await give_back_lines(jobs_db, runner_id, [two])
        if statistics == "of an empty table":
            await _execute(db, "DELETE FROM batch_lines")
        if statistics != "none":
            await _execute(db, "VACUUM ANALYZE batch_lines, batch_pools, batches, usage_events")
    batch_id = await make_batch(db, tenant_id, some_lines(2_500, POOL))
    leases = [line for _ in range(8) for line in await claim_lines(jobs_db, runner_id, POOL, {(tenant_id, batch_id): 256})]
    before = await _lines_read(db, jobs_db)
    await end_lines(jobs_db, runner_id, [ended(lease) for lease in leases[::10]])
    await give_back_lines(jobs_db, runner_id, leases[1::10])
    count = len(leases[::10]) + len(leases[1::10])
    assert (await batch_row(db, batch_id)).completed == len(leases[::10])
    read = await _lines_read(db, jobs_db) - before
    await jobs_db.close()
    assert count <= read <= 5 * count


async def _execute(db: Database, statement: str) -> None:
    async with db.autocommit() as connection:
        await connection.execute(text(statement))


async def _lines_read(db: Database, jobs_db: Database) -> int:
    """Return how many rows of `batch_lines` were read so far, as Postgres counts them."""
    async with jobs_db.begin(SYSTEM) as connection:
        await connection.execute(text("SELECT pg_stat_force_next_flush()"))
    async with db.begin(SYSTEM) as connection:
        query = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'batch_lines'"
        return int((await connection.execute(text(query))).scalar_one())
