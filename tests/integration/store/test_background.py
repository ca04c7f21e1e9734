"""Responses in the background on a real Postgres: leases, fencing, ends that exclude each other, and logs."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import text

from lmaas.errors import InProgress, OverLimit, Unauthenticated
from lmaas.states import BackgroundStatus, UsageStatus
from lmaas.store import background
from lmaas.store.background import (
    Ending,
    Lease,
    NewBackground,
    add_events,
    begin,
    cancel,
    claim,
    create,
    delete_response,
    find_open,
    finish,
    give_back,
    leased,
    settle,
)
from lmaas.store.database import Database
from lmaas.store.event_logs import FIRST_EVENT, Piece, progress, read_log
from lmaas.store.idempotency import Answer, Claim, take
from lmaas.store.responses import Response, find_response
from lmaas.store.retention import delete_expired, delete_oldest, delete_state, stored_bytes
from lmaas.store.runners import LeaseLost, end, free_lost, register
from lmaas.store.scopes import OPERATOR, SYSTEM
from lmaas.store.tenants import Tenant, delete_tenant
from lmaas.store.usage import UsageEvent, list_events, record_events
from tests.integration.store.build import tenant, usage_event

MONTH, DAY = timedelta(days=30), timedelta(days=1)
BODY = Response("resp_1", b"[]", b'{"output":[]}', None, 10, 2)


@pytest.fixture
async def acme(db: Database) -> Tenant:
    return await tenant(db, "acme")


async def new(db: Database, owner: Tenant, response_id: str = "resp_1", *, is_streamed: bool = True, most: int = 100) -> None:
    events = b"e0\n\ne1\n\n" if is_streamed else None
    made = NewBackground(response_id, "key_1", None, None, b"request", b"[]", b"{}", events)
    await create(db, owner.id, made, most=most, deadline=DAY, kept_for=MONTH)


async def one(db: Database, runner_id: str) -> Lease:
    (lease,) = await claim(db, runner_id, 10)
    return lease


def ending(owner: Tenant, *pieces: Piece, response_id: str = "resp_1", request_id: str = "req_1") -> Ending:
    event = replace(usage_event(request_id, owner.id), status=UsageStatus.COMPLETED)
    last = pieces[-1].last if pieces else FIRST_EVENT - 1
    return Ending(BackgroundStatus.COMPLETED, replace(BODY, id=response_id), (), pieces, last + 1, True, event)


async def ledger(db: Database) -> dict[str, str]:
    return {event.request_id: str(event.status) for event in await list_events(db, OPERATOR)}


async def count(db: Database, table: str) -> int:
    async with db.begin(SYSTEM) as connection:
        return int((await connection.execute(text(f"SELECT count(*) FROM {table}"))).scalar_one())  # noqa: S608 (our own names)


async def change(db: Database, values: str) -> None:
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text(f"UPDATE background_responses SET {values}"))  # noqa: S608 (our own values)


async def test_the_life_of_a_response(db: Database, gateway_db: Database, jobs_db: Database, acme: Tenant) -> None:
    await new(gateway_db, acme)
    found = await find_open(gateway_db, acme.id, "resp_1")
    assert found is not None
    assert (found.status, found.input, found.body) == (BackgroundStatus.QUEUED, b"[]", b"{}")
    lease = await one(jobs_db, await register(jobs_db))
    assert lease.attempt == 1
    run = await begin(jobs_db, lease)
    assert run is not None
    assert (run.request, run.next_event, run.failures, run.losses, run.is_overdue) == (b"request", 2, 0, 0, False)
    await add_events(jobs_db, lease.runner_id, {acme.id: [(lease, Piece(2, 3, b"e2\n\ne3\n\n"))]})
    # Once more, as if the reply had been lost.
    await add_events(jobs_db, lease.runner_id, {acme.id: [(lease, Piece(2, 3, b"e2\n\ne3\n\n"))]})
    assert await progress(gateway_db, acme.id, ["resp_1", "resp_2"]) == {"resp_1": (4, False)}
    found = await find_open(gateway_db, acme.id, "resp_1")
    assert found is not None
    assert found.status is BackgroundStatus.IN_PROGRESS
    assert await finish(jobs_db, lease, ending(acme, Piece(2, 3, b"again"), Piece(4, 4, b"e4\n\n")), MONTH)
    log = await read_log(gateway_db, acme.id, "resp_1", 0)
    assert log is not None
    assert (log.status, log.has_ended, log.next_event) == (BackgroundStatus.COMPLETED, True, 5)
    assert [(piece.first, piece.last, piece.events) for piece in log.pieces] == [
        (0, 1, b"e0\n\ne1\n\n"),
        (2, 3, b"e2\n\ne3\n\n"),
        (4, 4, b"e4\n\n"),
    ]
    assert await find_open(gateway_db, acme.id, "resp_1") is None
    assert await find_response(gateway_db, acme.id, "resp_1") == BODY
    assert await ledger(db) == {"req_1": "completed"}
    assert await leased(jobs_db, lease.runner_id) == {}
    # The other ends come too late.
    assert not await finish(jobs_db, lease, ending(acme), MONTH)
    assert not await settle(jobs_db, lease, None)
    assert not await cancel(gateway_db, acme.id, BODY, MONTH)
    await give_back(jobs_db, lease)
    assert await claim(jobs_db, lease.runner_id, 10) == []


async def test_a_lost_lease_changes_nothing(db: Database, gateway_db: Database, jobs_db: Database, acme: Tenant) -> None:
    await new(gateway_db, acme)
    lost = await one(jobs_db, await register(jobs_db))
    assert await begin(jobs_db, lost) is not None
    await add_events(jobs_db, lost.runner_id, {acme.id: [(lost, Piece(2, 4, b"old"))]})
    assert await free_lost(jobs_db, 0) == lost.runner_id
    with pytest.raises(LeaseLost):
        await claim(jobs_db, lost.runner_id, 10)
    lease = await one(jobs_db, await register(jobs_db))
    assert lease.attempt == 2
    run = await begin(jobs_db, lease)
    assert run is not None
    # The number 5 is that of the event which reports this.
    assert (run.next_event, run.losses) == (6, 1)
    assert await begin(jobs_db, lease) == run, "a repeated call is no further loss"
    assert await begin(jobs_db, lost) is None
    await add_events(jobs_db, lost.runner_id, {acme.id: [(lost, Piece(5, 5, b"late"))]})
    await add_events(jobs_db, lost.runner_id, {acme.id: [(lost, Piece(6, 6, b"late"))]})
    assert not await finish(jobs_db, lost, ending(acme), MONTH)
    assert not await settle(jobs_db, lost, usage_event("req_1", acme.id))
    await give_back(jobs_db, lost, failed=True)
    assert await leased(jobs_db, lost.runner_id) == {}
    assert await leased(jobs_db, lease.runner_id) == {lease: False}
    log = await read_log(gateway_db, acme.id, "resp_1", -1)
    assert log is not None
    assert (log.first_event, log.next_event, [piece.events for piece in log.pieces]) == (6, 6, [b"e0\n\ne1\n\n"])
    assert await ledger(db) == {}
    await record_events(db, [replace(usage_event("req_1_2", acme.id), status=UsageStatus.WASTED)])
    assert await finish(jobs_db, lease, ending(acme, Piece(6, 6, b"new"), request_id="req_1_2"), MONTH)
    await record_events(db, [replace(usage_event("req_1_2", acme.id), status=UsageStatus.WASTED)])
    assert await ledger(db) == {"req_1_2": "completed"}


async def test_a_run_that_is_given_back_is_no_loss(gateway_db: Database, jobs_db: Database, acme: Tenant) -> None:
    await new(gateway_db, acme)
    runner_id = await register(jobs_db)
    for failures in range(3):
        lease = await one(jobs_db, runner_id)
        run = await begin(jobs_db, lease)
        assert run is not None
        assert (run.failures, run.losses, run.next_event) == (failures, 0, 2)
        await give_back(jobs_db, lease, failed=True)
    lease = await one(jobs_db, runner_id)
    await give_back(jobs_db, lease, delay_s=60)
    assert await claim(jobs_db, runner_id, 10) == []


async def test_a_runner_that_ends_frees_what_it_leased(gateway_db: Database, jobs_db: Database, acme: Tenant) -> None:
    await new(gateway_db, acme)
    first, second = await register(jobs_db), await register(jobs_db)
    await one(jobs_db, first)
    assert await claim(jobs_db, second, 10) == []
    await end(jobs_db, first)
    assert (await one(jobs_db, second)).attempt == 2


async def test_tenants_take_turns(db: Database, gateway_db: Database, jobs_db: Database, acme: Tenant) -> None:
    globex = await tenant(db, "globex")
    for number in range(6):
        await new(gateway_db, acme, f"resp_a{number}")
    await new(gateway_db, globex, "resp_g0")
    await new(gateway_db, globex, "resp_g1")
    runner_id = await register(jobs_db)
    order = [(await claim(jobs_db, runner_id, 1))[0].id for _ in range(8)]
    assert sorted(order[:4]) == ["resp_a0", "resp_a1", "resp_g0", "resp_g1"]
    assert order[4:] == ["resp_a2", "resp_a3", "resp_a4", "resp_a5"]


async def test_leases_have_a_limit_of_bytes(gateway_db: Database, jobs_db: Database, acme: Tenant) -> None:
    for number in range(4):
        await new(gateway_db, acme, f"resp_{number}")
    runner_id = await register(jobs_db)
    (first,) = await claim(jobs_db, runner_id, 10, 1)
    assert first.size_bytes > 256
    assert len(await claim(jobs_db, runner_id, 10, first.size_bytes + 1)) == 2
    assert len(await claim(jobs_db, runner_id, 10)) == 1


async def test_each_response_is_leased_once(gateway_db: Database, jobs_db: Database, acme: Tenant) -> None:
    for number in range(20):
        await new(gateway_db, acme, f"resp_{number}")
    runners = [await register(jobs_db) for _ in range(4)]
    claimed = await asyncio.gather(*(claim(jobs_db, runner_id, 3) for runner_id in runners for _ in range(4)))
    ids = [lease.id for leases in claimed for lease in leases]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("kind", ["cancelled", "deleted", "cancelled and deleted"])
async def test_an_ended_run_is_charged_by_its_runner(
    db: Database, gateway_db: Database, jobs_db: Database, acme: Tenant, kind: str
) -> None:
    await new(gateway_db, acme)
    lease = await one(jobs_db, await register(jobs_db))
    await begin(jobs_db, lease)
    if "cancelled" in kind:
        assert await cancel(gateway_db, acme.id, BODY, MONTH)
        assert not await cancel(gateway_db, acme.id, BODY, MONTH)
        assert await find_response(gateway_db, acme.id, "resp_1") == BODY
    if "deleted" in kind:
        assert await delete_response(gateway_db, acme.id, "resp_1")
        assert not await delete_response(gateway_db, acme.id, "resp_1")
        assert await count(db, "response_events") == 0
    assert await leased(jobs_db, lease.runner_id) == {lease: True}
    await add_events(jobs_db, lease.runner_id, {acme.id: [(lease, Piece(2, 2, b"late"))]})
    assert not await finish(jobs_db, lease, ending(acme), MONTH)
    event: UsageEvent = replace(usage_event("req_1", acme.id), status=UsageStatus.ABORTED)
    assert await settle(jobs_db, lease, event)
    assert not await settle(jobs_db, lease, replace(event, request_id="req_2"))
    assert await ledger(db) == {"req_1": "aborted"}
    log = await read_log(gateway_db, acme.id, "resp_1", 1)
    assert (log is None) is ("deleted" in kind)
    assert log is None or (log.status, log.pieces) == (BackgroundStatus.CANCELLED, [])


async def test_of_two_ends_at_the_same_time_one_holds(db: Database, gateway_db: Database, jobs_db: Database, acme: Tenant) -> None:
    runner_id = await register(jobs_db)
    for number in range(10):
        response_id = f"resp_{number}"
        await new(gateway_db, acme, response_id)
        lease = await one(jobs_db, runner_id)
        ended = await asyncio.gather(
            finish(jobs_db, lease, ending(acme, response_id=response_id, request_id=f"req_{number}"), MONTH),
            cancel(gateway_db, acme.id, replace(BODY, id=response_id), MONTH),
        )
        assert sorted(ended) == [False, True]
        assert ("completed" if ended[0] else None) == (await ledger(db)).get(f"req_{number}")
    assert await count(db, "responses") == 10


async def test_limits_of_unfinished_responses(
    gateway_db: Database, jobs_db: Database, acme: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await asyncio.gather(*(new(gateway_db, acme, f"resp_{n}", most=3) for n in range(8)), return_exceptions=True)
    assert [type(each) for each in made if each is not None] == [OverLimit] * 5
    lease = (await claim(jobs_db, await register(jobs_db), 1))[0]
    assert await finish(jobs_db, lease, ending(acme, response_id=lease.id), MONTH)
    await new(gateway_db, acme, "resp_8", most=3)
    monkeypatch.setattr(background, "MAX_OPEN_BYTES", 100)
    with pytest.raises(OverLimit, match="bytes"):
        await new(gateway_db, acme, "resp_9")


async def test_a_response_and_its_idempotency_key_are_kept_together(db: Database, gateway_db: Database, acme: Tenant) -> None:
    mine, other = Claim(acme.id, "k", b"hash", "req_1"), Claim(acme.id, "k", b"hash", "req_2")
    made = NewBackground("resp_1", "key_1", None, None, b"", b"[]", b"{}", None)
    answer = Answer(200, "application/json", b"{}")
    assert await take(gateway_db, mine) is None
    with pytest.raises(InProgress):
        await create(gateway_db, acme.id, made, most=9, deadline=DAY, kept_for=MONTH, kept=(other, answer))
    assert await count(db, "background_responses") == 0
    await create(gateway_db, acme.id, made, most=9, deadline=DAY, kept_for=MONTH, kept=(mine, answer))
    earlier = await take(gateway_db, other)
    assert earlier is not None
    assert earlier.answer == answer


async def test_retention(db: Database, gateway_db: Database, jobs_db: Database, controller_db: Database, acme: Tenant) -> None:
    await new(gateway_db, acme)
    await new(gateway_db, acme, "resp_2")
    assert (await stored_bytes(controller_db))[acme.id] > 2 * 256
    leases = await claim(jobs_db, await register(jobs_db), 10)
    for lease in leases:
        assert await finish(jobs_db, lease, ending(acme, response_id=lease.id), MONTH)
    assert await delete_expired(controller_db) == 0
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE background_responses SET expires_at = now() WHERE id = 'resp_1'"))
    assert await read_log(gateway_db, acme.id, "resp_1", -1) is None
    assert await delete_expired(controller_db) == 1
    assert (await count(db, "background_responses"), await count(db, "response_events"), await count(db, "responses")) == (1, 1, 2)
    # The log expires first, so it is deleted first.
    assert await delete_oldest(controller_db, acme.id, 1) > 0
    assert (await count(db, "background_responses"), await count(db, "responses")) == (0, 2)


async def test_retention_leaves_what_its_runner_has_yet_to_charge(
    db: Database, gateway_db: Database, jobs_db: Database, controller_db: Database, acme: Tenant
) -> None:
    await new(gateway_db, acme)
    lease = await one(jobs_db, await register(jobs_db))
    await begin(jobs_db, lease)
    assert await cancel(gateway_db, acme.id, BODY, MONTH)
    await change(db, "expires_at = now()")
    assert await delete_expired(controller_db) == 0
    assert await delete_oldest(controller_db, acme.id, 10_000) > 0
    assert (await count(db, "background_responses"), await count(db, "responses")) == (1, 0)
    assert await settle(jobs_db, lease, replace(usage_event("req_1", acme.id), status=UsageStatus.ABORTED))
    assert await ledger(db) == {"req_1": "aborted"}
    assert await delete_expired(controller_db) == 1


async def test_a_deleted_tenant_has_nothing_left(db: Database, gateway_db: Database, jobs_db: Database, acme: Tenant) -> None:
    await new(gateway_db, acme)
    lease = await one(jobs_db, await register(jobs_db))
    await delete_tenant(db, acme.id)
    while await delete_state(db, acme.id):
        pass
    assert (await count(db, "background_responses"), await count(db, "response_events")) == (0, 0)
    assert not await finish(jobs_db, lease, ending(acme), MONTH)
    assert await leased(jobs_db, lease.runner_id) == {}
    assert await ledger(db) == {}
    with pytest.raises(Unauthenticated):
        await new(gateway_db, acme, "resp_2")


async def test_what_is_past_its_deadline_is_leased_to_be_ended(db: Database, gateway_db: Database, jobs_db: Database, acme: Tenant) -> None:
    await new(gateway_db, acme)
    runner_id = await register(jobs_db)
    await give_back(jobs_db, await one(jobs_db, runner_id), delay_s=600)
    assert await claim(jobs_db, runner_id, 10) == []
    await change(db, "deadline_at = now()")
    run = await begin(jobs_db, await one(jobs_db, runner_id))
    assert run is not None
    assert run.is_overdue
