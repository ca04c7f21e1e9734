"""Ledger equals truth when any one process dies at any moment.

Real processes: Postgres, Valkey, two gateways, two controllers, and the supervisors and (fake) engines that the controllers start. Workers
of three tenants send requests of all kinds and protocols, while a monkey kills (`kill -9`) gateways, controllers, engines, supervisors and
Valkey, which comes back with its memory or without, flushes and stalls Valkey, and stops and starts Postgres. The test restarts only the
processes that it has killed, as an init system does: a process that ends by itself fails the test.

The fake engines record every token when they generate it (`lmaas.testing.truth`). `tests/support/verdict.py` defines equality for each way
in which a request can end.

A known limit, and no promise: a request of which only its gateway and Valkey know is lost if both die within the same seconds. The monkey
keeps these two faults apart by more than a lease (`APART_S`); every other pair of faults may overlap.

The monkey continues for 20 s, times LMAAS_TEST_EFFORT, and until it has caused every fault once. `CHAOS_SEED` repeats the choices of a run,
not its timing.
"""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator

import aiohttp
import pytest

from lmaas.states import TERMINAL, Observed
from lmaas.store.replicas import Replica, list_replicas
from lmaas.store.scopes import OPERATOR
from lmaas.store.usage import list_events
from lmaas.testing.truth import read_truth
from tests.support.conditions import until
from tests.support.effort import tries
from tests.support.verdict import Fault, judge
from tests.system.chaos.clients import RESPONSES, Worker
from tests.system.chaos.monkey import Monkey
from tests.system.chaos.rest import comes_to_rest
from tests.system.chaos.service import GATEWAYS, Service, running

SECONDS = tries(20)
#: Name, workers, adapters, and the maximum number of queued requests.
TENANTS = (("acme", 8, 2, 256), ("globex", 8, 2, 256), ("bounded", 6, 1, 1))


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with running(embeds=True, engine_max_replicas=3) as service:
        yield service


@pytest.mark.search
@pytest.mark.timeout(SECONDS + 300)
async def test_the_ledger_equals_the_truth_whatever_dies(service: Service) -> None:
    seed = os.environ.get("CHAOS_SEED") or secrets.token_hex(4)
    print(f"CHAOS_SEED={seed}")  # noqa: T201 (pytest shows it if the test fails)
    clients = [
        client
        for name, count, adapters, bound in TENANTS
        for client in await service.clients(name, count, adapters=adapters, max_queued=bound)
    ]
    workers = [Worker(service, client, f"{seed} {number}") for number, client in enumerate(clients)]
    stop = asyncio.Event()
    started = time.monotonic()
    jobs = [
        asyncio.create_task(worker.run(stop), name=worker_name) for worker_name, worker in zip(map(str, range(99)), workers, strict=False)
    ]
    try:
        await Monkey(service, workers, seed).run(SECONDS)
    finally:
        stop.set()
        await asyncio.gather(*jobs)
    print(f"{time.monotonic() - started:.0f} s: {[(round(one.began, 1), one.kind, one.target) for one in service.faults]}")  # noqa: T201
    await _answers_again(service, workers)
    await comes_to_rest(service)
    await _are_stored(service, workers)

    ledger = await list_events(service.db, OPERATOR)
    truth = read_truth(service.truth)
    attempts = [attempt for worker in workers for attempt in worker.attempts]
    verdict = judge(attempts, ledger, truth, service.faults)
    print(dict(verdict.statuses), dict(verdict.answers), f"oldest checkpoint {verdict.oldest_checkpoint_s:.2f} s")  # noqa: T201
    print(service.logs())  # noqa: T201
    assert not verdict.complaints, "\n".join([f"{len(verdict.complaints)} complaints", *verdict.complaints[:20]])
    assert service.ended() == {}, "a process ended by itself"
    rows = await list_replicas(service.db, ended=True)
    failed = [row for row in rows if row.observed in TERMINAL - {Observed.STOPPED} and row.id not in service.killed_replicas]
    assert [row for row in failed if not _cut_short(row, service.faults)] == [], "replicas that failed without a kill"
    # The faults really hit requests in every state.
    assert len(attempts) >= 200
    assert {"completed", "aborted", "failed", "lost"} <= set(verdict.statuses), verdict.statuses


def _cut_short(row: Replica, faults: list[Fault]) -> bool:
    """Return whether a replica was written off at its start because its controller was killed during it, which leaves a row and nothing
    else, or because two controllers were active for a short time, as after the loss of the connection that holds the lead."""
    made = row.created_at.timestamp()
    disturbed = any(fault.kind.startswith(("controller", "postgres")) and fault.began - 10 < made < fault.ended + 3 for fault in faults)
    return disturbed and row.observed == Observed.LOST and row.ready_at is None


async def _answers_again(service: Service, workers: list[Worker]) -> None:
    """Check that every gateway serves every tenant without a restart."""
    stop = asyncio.Event()
    before = [len(worker.attempts) for worker in workers]
    jobs = [asyncio.create_task(worker.run(stop)) for worker in workers]

    def answered() -> bool:
        later = [attempt for worker, count in zip(workers, before, strict=True) for attempt in worker.attempts[count:] if attempt.done]
        return len({(attempt.gateway, attempt.model) for attempt in later}) >= GATEWAYS * 3

    try:
        await until(answered)
    finally:
        stop.set()
        await asyncio.gather(*jobs)


async def _are_stored(service: Service, workers: list[Worker]) -> None:
    """Check that every response whose end its client has received can be read, by its own tenant only.

    While Postgres was away, a response was not held back for long: it may be lost if its gateway was killed before Postgres came back.
    """
    outages = [fault for fault in service.faults if fault.kind == "postgres"]
    url = service.url(service.gateways[0]) + RESPONSES
    seen = 0
    async with aiohttp.ClientSession() as session:
        for worker, other in zip(workers, [*workers[1:], workers[0]], strict=True):
            for response_id, attempt in worker.stored:
                async with session.get(f"{url}/{response_id}", headers=worker.headers) as response:
                    found = await response.json()
                    may_be_lost = any(fault.began - 3 < attempt.ended < fault.ended + 3 for fault in outages)
                    assert response.status == 200 or may_be_lost, (response_id, attempt, found)
                if response.status == 200:
                    seen += 1
                    assert found["usage"]["output_tokens"] == attempt.tokens, (found, attempt)
                if worker.tenant != other.tenant:
                    async with session.get(f"{url}/{response_id}", headers=other.headers) as response:
                        assert response.status == 404
    assert seen >= 20
