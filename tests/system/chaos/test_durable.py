"""Batches and background responses when any one process dies at any moment: every line has one result, and one charge.

The processes and faults are those of `test_chaos.py`, with two job runners that are killed, both at once too, and suspended until their
work is taken from them. Three tenants have batches of 2,000 lines for several models and endpoints, and background responses, beside
interactive requests. Some lines must fail, and some batches and responses are cancelled.

`tests/support/durable_verdict.py` defines the agreement of the batches' files, the ledger and the engines' records. At the end no work is
left: no lines, no leases, no tickets, and no bytes in the object store without a file.
"""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text

from lmaas.store.scopes import OPERATOR, SYSTEM
from lmaas.store.usage import list_events
from lmaas.testing.truth import read_truth
from tests.support.conditions import until
from tests.support.durable_verdict import judge_durable
from tests.support.effort import tries
from tests.support.verdict import judge
from tests.system.chaos.clients import Worker
from tests.system.chaos.durable import BATCHES, RESPONSES, Owner
from tests.system.chaos.durable_monkey import DurableMonkey
from tests.system.chaos.rest import comes_to_rest
from tests.system.chaos.service import Service, running

SECONDS = tries(20)
#: Name, workers with interactive requests, adapters, and the batches: their endpoints and numbers of lines.
TENANTS = {
    "acme": (3, 2, {"/v1/chat/completions": 500, "/v1/responses": 200}),
    "globex": (3, 2, {"/v1/completions": 500, "/v1/embeddings": 200}),
    "initech": (1, 1, {"/v1/chat/completions": 400, "/v1/responses": 200}),
}
#: The completion tokens of a line.
TOKENS = (2, 12)
#: The maximum time of all work after the last fault.
END_S = 120.0


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with running(embeds=True, runners=2, engine_max_replicas=3) as service:
        yield service


@pytest.mark.search
@pytest.mark.timeout(SECONDS + 400)
async def test_every_line_ends_once_whatever_dies(service: Service) -> None:
    seed = os.environ.get("CHAOS_SEED") or secrets.token_hex(4)
    print(f"CHAOS_SEED={seed}")  # noqa: T201 (pytest shows it if the test fails)
    workers, owners = [], []
    for name, (count, adapters, _) in TENANTS.items():
        *others, durable = await service.clients(name, count + 1, adapters=adapters, max_queued=256)
        workers += [Worker(service, client, f"{seed} {name} {number}") for number, client in enumerate(others)]
        owners.append(Owner(service, durable, f"{seed} {name}"))
    stop = asyncio.Event()
    began = time.monotonic()
    try:
        async with asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(worker.run(stop))
            created = [
                group.create_task(owner.create_batch(path, count, tokens=TOKENS))
                for owner, (_, _, batches) in zip(owners, TENANTS.values(), strict=True)
                for path, count in batches.items()
            ]
            await asyncio.gather(*created)
            for owner in owners:
                group.create_task(_more(owner, stop))
            await DurableMonkey(service, workers, owners, seed).run(SECONDS)
            stop.set()
    finally:
        print(f"{time.monotonic() - began:.0f} s: {[(round(one.began, 1), one.kind, one.target) for one in service.faults]}")  # noqa: T201
        print(service.logs())  # noqa: T201

    async def all_ended() -> bool:
        return all([await owner.ended() for owner in owners])

    await until(all_ended, timeout_s=END_S, every_s=0.5)
    took = time.monotonic() - began
    await comes_to_rest(service)

    ledger, truth = await list_events(service.db, OPERATOR), read_truth(service.truth)
    keys = {owner.key_id for owner in owners}
    mine = {event.request_id for event in ledger if event.key_id in keys}
    ends = [end for owner in owners for end in await owner.batch_ends()]
    responses = [response for owner in owners for response in await owner.response_ends()]
    verdict = judge_durable(
        ends,
        responses,
        [event for event in ledger if event.request_id in mine],
        {request: deliveries for request, deliveries in truth.items() if request in mine},
        cancelled=frozenset().union(*(owner.cancelled for owner in owners)),
    )
    beside = judge(
        [attempt for worker in workers for attempt in worker.attempts],
        [event for event in ledger if event.request_id not in mine],
        {request: deliveries for request, deliveries in truth.items() if request not in mine},
        service.faults,
    )
    lines = sum(len(end.sent) for end in ends)
    print(f"{lines} lines, {len(responses)} responses in {took:.0f} s: {dict(verdict.statuses)}")  # noqa: T201
    print(f"charged {verdict.charged} tokens, wasted {verdict.wasted}; beside {dict(beside.statuses)}")  # noqa: T201
    complaints = verdict.complaints + beside.complaints
    assert not complaints, "\n".join([f"{len(complaints)} complaints", *complaints[:20]])
    assert service.ended() == {}, "a process ended by itself"
    await _nothing_is_left(service)
    # The faults really hit work in every state.
    assert lines >= 2000
    assert {"completed", "cancelled"} <= {str(end.batch["status"]) for end in ends}
    assert {"completed", "wasted"} <= set(verdict.statuses)
    assert len([response for response in responses if response["status"] in ("completed", "incomplete")]) >= 5


async def _more(owner: Owner, stop: asyncio.Event) -> None:
    """Create more work until `stop` is set: small batches, every second one of which is cancelled, and background responses. At most one
    has not ended at any time, so that the work ends soon after the last fault."""
    number = 0
    while not stop.is_set():
        number += 1
        batch = await owner.create_batch("/v1/chat/completions", 20, tokens=TOKENS)
        responses = [await owner.create_response(tokens) for tokens in (5, 60)]
        if number % 2 == 0:
            await owner.cancel(BATCHES, batch)
            await owner.cancel(RESPONSES, responses[-1])

        async def ended(responses: list[str] = responses) -> bool:
            return stop.is_set() or all([await owner.has_ended(response) for response in responses])

        await until(ended, timeout_s=END_S, every_s=0.5)


async def _nothing_is_left(service: Service) -> None:
    """Check that nothing of ended work is left in Postgres, and that the object store has the bytes of files only."""
    async with service.db.begin(SYSTEM) as connection:
        left = {
            table: (await connection.execute(text(f"SELECT count(*) FROM {table}"))).scalar_one()  # noqa: S608
            for table in ("batch_lines", "batch_pools")
        }
        rows = (await connection.execute(text("SELECT tenant_id, sha256 FROM files"))).all()
    assert left == {"batch_lines": 0, "batch_pools": 0}
    stored = {str(path.relative_to(service.settings.home / "objects")) for path in (service.settings.home / "objects/files").rglob("*")}
    # The sweeper removes the remains of a killed process, but later than this test waits.
    assert {f"files/{tenant}/{content}" for tenant, content in rows} <= stored
