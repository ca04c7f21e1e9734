"""Claims on idempotency keys, on a real Postgres."""

import asyncio
from datetime import timedelta

import pytest
from sqlalchemy import func, text

from lmaas.states import ClaimState
from lmaas.store import idempotency, tenants
from lmaas.store.database import Database
from lmaas.store.idempotency import ROWS_AT_ONCE, Answer, Claim, Earlier, delete_old, delete_surplus, give_up, keep, seen, take
from lmaas.store.scopes import SYSTEM
from tests.integration.store.build import tenant

ANSWER = Answer(200, "application/json", b'{"a":1}')


@pytest.fixture(autouse=True)
def up_for_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the server, which has just been started for these tests, as up for an hour."""
    monkeypatch.setattr(idempotency, "SERVER_STARTED", func.now() - timedelta(hours=1))


async def age(db: Database, interval: str) -> None:
    """Age the claims."""
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE idempotency SET seen_at = seen_at - CAST(:age AS interval)"), {"age": interval})


async def count(db: Database) -> int:
    async with db.begin(SYSTEM) as connection:
        return int((await connection.execute(text("SELECT count(*) FROM idempotency"))).scalar_one())


async def test_a_key_is_claimed_answered_and_expires(db: Database) -> None:
    acme = await tenant(db, "acme")
    first, second = (Claim(acme.id, "k", b"same", f"r{number}") for number in (1, 2))
    other = Claim(acme.id, "k", b"other", "r3")
    assert await take(db, first) is None
    assert await take(db, second) == Earlier("r1", True, None)
    assert await take(db, other) == Earlier("r1", False, None)
    assert await keep(db, first, ANSWER)
    assert await keep(db, first, ANSWER)
    assert await take(db, second) == Earlier("r1", True, ANSWER)
    assert await take(db, other) == Earlier("r1", False, None)
    await age(db, "23 hours 59 minutes")
    assert await take(db, second) == Earlier("r1", True, ANSWER)
    await age(db, "2 minutes")
    assert await take(db, other) is None
    assert await take(db, second) == Earlier("r3", False, None)
    assert await take(db, other) == Earlier("r3", True, None)  # nothing of the old response is left


async def test_a_key_that_is_given_up_is_free(db: Database) -> None:
    acme = await tenant(db, "acme")
    first, second = (Claim(acme.id, "k", b"same", f"r{number}") for number in (1, 2))
    assert await take(db, first) is None
    await give_up(db, second)  # a request does not own another one's claim
    assert await take(db, second) == Earlier("r1", True, None)
    await give_up(db, first)
    assert await count(db) == 0
    assert await take(db, second) is None


async def test_a_claim_is_taken_over_when_its_gateway_was_not_seen(db: Database) -> None:
    acme = await tenant(db, "acme")
    first, second = (Claim(acme.id, "k", b"same", f"r{number}") for number in (1, 2))
    assert await take(db, first) is None
    for _ in range(3):
        await age(db, "25 seconds")
        await seen(db, [second, first])
        assert await take(db, second) == Earlier("r1", True, None)
    await age(db, "31 seconds")
    assert await take(db, second) is None
    # The dead request comes back, but no longer owns the claim.
    await seen(db, [first])
    assert not await keep(db, first, ANSWER)
    await give_up(db, first)
    assert await keep(db, second, ANSWER)
    assert await take(db, first) == Earlier("r2", True, ANSWER)


async def test_of_many_at_once_one_gets_the_key(db: Database) -> None:
    acme = await tenant(db, "acme")
    claims = [Claim(acme.id, "k", b"same", f"r{number}") for number in range(20)]
    for answered in (True, False, False):  # a new key, then an expired response, then an abandoned claim
        results = await asyncio.gather(*(take(db, claim) for claim in claims))
        assert results.count(None) == 1
        winner = claims[results.index(None)]
        assert {result for result in results if result} == {Earlier(winner.request_id, True, None)}
        if answered:
            await keep(db, winner, ANSWER)
        await age(db, "25 hours" if answered else "31 seconds")


async def test_keys_are_each_tenants_own_and_go_with_it(db: Database) -> None:
    acme, other = await tenant(db, "acme"), await tenant(db, "other")
    mine, theirs = Claim(acme.id, "k", b"a", "r1"), Claim(other.id, "k", b"b", "r2")
    assert await take(db, mine) is None
    assert await take(db, theirs) is None
    await keep(db, theirs, ANSWER)
    await tenants.delete_tenant(db, acme.id)
    assert await count(db) == 1
    # The running request stores nothing for the deleted tenant.
    assert not await keep(db, mine, ANSWER)
    assert await take(db, mine) == Earlier("", True, None)
    assert await count(db) == 1
    assert await take(db, theirs) == Earlier("r2", True, ANSWER)


async def test_a_claim_waits_for_a_deletion_of_its_tenant(db: Database) -> None:
    acme = await tenant(db, "acme")
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE tenants SET deleted_at = now()"))
        taking = asyncio.create_task(take(db, Claim(acme.id, "k", b"a", "r1")))
        await asyncio.sleep(0.1)
        assert not taking.done()
    assert await taking == Earlier("", True, None)
    assert await count(db) == 0


async def test_old_rows_are_deleted_in_portions(db: Database) -> None:
    acme = await tenant(db, "acme")
    states = {"answer": ClaimState.DONE, "claim": ClaimState.RUNNING}
    values = ":tenant, :name || n, '', 'r', :state, now() - CAST(:age AS interval)"
    rows = text(f"INSERT INTO idempotency SELECT {values} FROM generate_series(1, :n) n")  # noqa: S608 (nothing of it is from outside)
    async with db.begin(SYSTEM) as connection:
        for name, old, number in (
            ("answer-new", "23 hours", 1),
            ("claim-new", "59 minutes", 1),
            ("answer-old", "25 hours", ROWS_AT_ONCE),
            ("claim-old", "2 hours", 7),
        ):
            state = states[name.partition("-")[0]].value
            await connection.execute(rows, {"tenant": acme.id, "name": name, "state": state, "age": old, "n": number})
    deleted: list[int] = []
    while deleted[-1:] != [0]:
        deleted.append(await delete_old(db))
    assert deleted == [ROWS_AT_ONCE, 7, 0]
    async with db.begin(SYSTEM) as connection:
        left = await connection.execute(text("SELECT key FROM idempotency ORDER BY key"))
        assert left.scalars().all() == ["answer-new1", "claim-new1"]


async def test_after_a_restart_of_the_server_nobody_is_taken_for_dead(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    acme = await tenant(db, "acme")
    first, second = (Claim(acme.id, "k", b"same", f"r{number}") for number in (1, 2))
    assert await take(db, first) is None
    await age(db, "5 minutes")
    monkeypatch.setattr(idempotency, "SERVER_STARTED", func.now() - timedelta(seconds=29))
    assert await take(db, second) == Earlier("r1", True, None), "the owner could not prove that it is alive"
    monkeypatch.setattr(idempotency, "SERVER_STARTED", func.now() - timedelta(seconds=31))
    assert await take(db, second) is None


async def test_a_tenants_oldest_answers_go_beyond_what_is_kept(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    acme, other = await tenant(db, "acme"), await tenant(db, "other")
    claims = [Claim(acme.id, f"k{number}", b"", f"r{number}") for number in range(6)]
    for number, claim in enumerate([*claims, Claim(other.id, "k", b"", "r")]):
        assert await take(db, claim) is None
        if number != 5:
            assert await keep(db, claim, Answer(200, "application/json", b"x" * 100))
        await age(db, "1 second")

    async def keys() -> list[str]:
        async with db.begin(SYSTEM) as connection:
            return list((await connection.execute(text("SELECT key FROM idempotency ORDER BY key"))).scalars())

    assert await delete_surplus(db) == 0
    monkeypatch.setattr(idempotency, "MAX_ANSWERS", 4)
    assert await delete_surplus(db) == 1
    assert await keys() == ["k", "k1", "k2", "k3", "k4", "k5"]
    monkeypatch.setattr(idempotency, "MAX_ANSWER_BYTES", 250)
    assert await delete_surplus(db) == 2
    assert await delete_surplus(db) == 0
    assert await keys() == ["k", "k3", "k4", "k5"], "a running request keeps its claim"
