"""Background tickets: they use the slots that interactive ones leave free, and give way to them."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace
from redis import Redis

from lmaas.errors import LmaasError
from lmaas.scheduling.client import Beat, Bounds, Scheduler, Ticket
from lmaas.scheduling.leases import Leases
from lmaas.scheduling.states import RetryReason
from lmaas.states import Observed
from lmaas.types import TokenCounts
from tests.integration.scheduling.build import Pool, Used, opened, quick, ticket
from tests.integration.scheduling.model.data import Rules
from tests.integration.scheduling.side_by_side import POOL, Both, Direct, library_with
from tests.support.conditions import until

NOW = 1_800_000_000_000
BOUNDS = Bounds(1000, 1000)
#: After this time without interactive tickets, nothing is reserved for them.
QUIET_MS = 60_000


def line(number: int, tenant: str = "batch", adapter: str = "", weight: int = 1) -> Ticket:
    """Return a background ticket."""
    return replace(ticket(number, tenant, adapter, weight, gateway="runner"), background=True, durable=True)


class Desk:
    """The scheduler beside its model, with a clock of the test's own."""

    def __init__(self, both: Both) -> None:
        self.both = both

    def beat(self, replica: str = "x", slots: int = 4, adapter_slots: int = 2, resident: tuple[str, ...] = ()) -> None:
        self.both.heartbeat(replica, Beat("http://engine", slots, adapter_slots, Observed.READY, list(resident)))

    def submit(self, *tickets: Ticket) -> list[str]:
        return [self.both.submit(each, BOUNDS)["state"] for each in tickets]

    def release(self, *numbers: int) -> None:
        for number in numbers:
            self.both.release(self.both.model.tickets[f"r{number}"].ticket, None, 100, (1, 0, 1))

    def state(self, *numbers: int) -> list[str]:
        return [str(self.both.model.tickets[f"r{number}"].state) for number in numbers]

    def later(self, ms: int) -> None:
        """Let time pass, during which every process sends its heartbeats."""
        for _ in range(0, ms, 1000):
            self.both.at(self.both.now + 1000)
            if names := list(self.both.model.tickets):
                self.both.renew([(name, None) for name in names])
            for name, replica in list(self.both.model.replicas.items()):
                self.beat(name, replica.slots, replica.adapter_slots)

    def room(self) -> int:
        return int(self.both.room()["room"])


@pytest.fixture
def desk(valkey_url: str) -> Iterator[Desk]:
    with Redis.from_url(valkey_url, decode_responses=True) as client:
        yield Desk(Both(client, Rules(), NOW, Direct(client, library_with(Rules()))))


def test_a_batch_alone_takes_every_slot(desk: Desk) -> None:
    desk.beat(slots=4)
    assert desk.room() == 4
    assert desk.submit(*(line(number) for number in range(1, 6))) == ["granted"] * 4 + ["queued"]
    desk.release(1)
    assert desk.state(5) == ["granted"]


def test_a_batch_takes_every_slot_beside_interactive_tickets_too(desk: Desk) -> None:
    desk.beat(slots=16)
    desk.submit(*(ticket(number) for number in range(6)))
    assert desk.room() == 16 - 6
    desk.release(*range(6))
    assert desk.room() == 16


def test_an_interactive_ticket_runs_beside_background_tickets_if_no_slot_is_free(desk: Desk) -> None:
    desk.beat(slots=2)
    desk.submit(line(1), line(2), line(3))
    assert desk.submit(ticket(4), ticket(5), ticket(6)) == ["granted", "granted", "queued"]
    assert desk.state(1, 2, 3) == ["granted", "granted", "queued"], "their engine pauses them"
    assert desk.both.stats()["background"] == {"queued": 1, "load": 2, "yields": 0, "reserve": 0}
    # No background ticket begins before all of them have their own slots again.
    desk.release(4)
    assert desk.state(6, 3) == ["granted", "queued"]
    desk.release(5, 6, 1)
    assert desk.state(3) == ["granted"]


def test_the_replica_with_the_least_interactive_load_is_next(desk: Desk) -> None:
    for name in ("x", "y", "z"):
        desk.beat(name, slots=2)
    desk.submit(*(line(number) for number in range(6)))
    places = [desk.both.submit(ticket(number), BOUNDS)["replica"] for number in range(10, 16)]
    assert sorted(places[:3]) == sorted(places[3:]) == ["x", "y", "z"]


def test_a_free_slot_is_taken_first(desk: Desk) -> None:
    desk.beat("x", slots=2)
    desk.submit(line(1), line(2))
    desk.beat("y", slots=4)
    desk.submit(ticket(3), ticket(4))
    assert desk.both.submit(ticket(5), BOUNDS)["replica"] == "y"


def test_the_latest_background_ticket_gives_its_adapter_slot(desk: Desk) -> None:
    desk.beat(slots=4, adapter_slots=2, resident=("A", "B", "C"))
    desk.submit(line(1, adapter="A"), line(2, adapter="B"))
    desk.both.renew([("r2", (5, 0, 7))])
    reply = desk.both.submit(ticket(3, adapter="C"), BOUNDS)
    assert reply["state"] == "granted"
    assert desk.state(1, 2) == ["granted", "yielded"]
    [told] = [json.loads(each.split(" ", 1)[1]) for each in _said(desk, "lmaas:gateway:runner")]
    assert told == {"id": "r2", "event": "yielded", "attempts": 0}
    assert desk.both.stats()["background"] == {"queued": 0, "load": 1, "yields": 1, "reserve": 1}
    # Its owner ends it, and its usage is settled then.
    desk.release(2)


def _said(desk: Desk, channel: str) -> list[str]:
    return [f"{to} {json.dumps(news)}" for to, news in desk.both.model.said if to == channel]


def put_back(desk: Desk, count: int) -> None:
    """Let an interactive ticket put back this many background tickets, and end all of them."""
    desk.submit(*(line(number, adapter="A") for number in range(count)))
    assert desk.submit(ticket(99, adapter="B")) == ["granted"]
    assert desk.state(*range(count)) == ["yielded"] * count
    desk.release(99, *range(count))


def test_what_was_put_back_is_reserved_for_a_while(desk: Desk) -> None:
    desk.beat(slots=16, adapter_slots=1, resident=("A", "B"))
    put_back(desk, 4)
    assert desk.room() == 16 - 4
    desk.later(30_000)
    assert desk.room() == 16 - 3, "two thirds of the four"
    desk.later(QUIET_MS)
    assert desk.room() == 16, "no interactive request has come for a minute"


def test_the_reserve_is_at_most_half_of_the_slots(desk: Desk) -> None:
    desk.beat(slots=4, adapter_slots=1, resident=("A", "B"))
    put_back(desk, 4)
    assert desk.room() == 2
    desk.both.deregister("x")
    desk.beat("y", slots=1)
    assert desk.room() == 1, "a single slot cannot be reserved"


def test_no_background_ticket_is_placed_while_an_interactive_one_waits(desk: Desk) -> None:
    desk.beat(slots=4, adapter_slots=1, resident=("A", "B"))
    desk.submit(ticket(1, adapter="A"))
    assert desk.submit(ticket(2, adapter="B"), line(3)) == ["queued", "queued"]
    desk.release(1)
    assert desk.state(2, 3) == ["granted", "granted"]


def test_background_tickets_are_not_put_back_if_that_makes_no_room(desk: Desk) -> None:
    desk.beat(slots=4, adapter_slots=2, resident=("A", "B", "C"))
    desk.submit(line(9, adapter="A"), ticket(1, adapter="A"), ticket(2, adapter="B"))
    assert desk.submit(ticket(3, adapter="C")) == ["queued"]
    assert desk.state(9) == ["granted"], "its adapter slot would stay taken"


def test_all_background_tickets_of_an_adapter_make_room_for_another_adapter(desk: Desk) -> None:
    desk.beat(slots=6, adapter_slots=2, resident=("A", "B", "C"))
    desk.submit(line(1, adapter="A"), line(2, adapter="A"), ticket(3, adapter="B"))
    assert desk.submit(ticket(4, adapter="C")) == ["granted"]
    assert desk.state(1, 2) == ["yielded", "yielded"]


def test_a_heavy_interactive_ticket_needs_a_replica_with_so_few_interactive_ones(desk: Desk) -> None:
    desk.beat("x", slots=4)
    desk.submit(*(line(number) for number in range(4)), ticket(10), ticket(11))
    assert desk.submit(ticket(12, weight=3)) == ["queued"]
    desk.release(10)
    assert desk.state(12, *range(4)) == ["granted"] * 5


def test_a_replica_where_the_adapter_runs_is_first(desk: Desk) -> None:
    desk.beat("x", slots=2, resident=("A",))
    desk.submit(line(1, adapter="A"), line(2))
    desk.beat("y", slots=2)
    desk.submit(line(3), line(4))
    assert desk.both.submit(ticket(5, adapter="A"), BOUNDS)["replica"] == "x"
    assert desk.state(1, 2, 3, 4) == ["granted"] * 4


def test_one_call_puts_back_a_bounded_number(desk: Desk) -> None:
    desk.beat(slots=40, adapter_slots=1, resident=("A", "B"))
    desk.submit(*(line(number, adapter="A") for number in range(17)))
    assert desk.submit(ticket(50, adapter="B")) == ["queued"]
    assert desk.both.stats()["background"]["yields"] == 0, "it would put back more than one call may, so none is put back"
    desk.release(0)
    assert desk.state(50) == ["granted"]


def test_the_last_free_adapter_slot_is_for_interactive_work(desk: Desk) -> None:
    desk.beat(slots=8, adapter_slots=2, resident=("A", "B"))
    desk.submit(ticket(1, adapter="A"))
    assert desk.submit(line(2, adapter="B"), line(3, adapter="A"), line(4)) == ["queued", "granted", "granted"]
    desk.release(1)
    desk.later(QUIET_MS)
    assert desk.state(2) == ["granted"]


def test_tenants_take_turns_in_the_background_and_pay_nothing_for_it_elsewhere(desk: Desk) -> None:
    desk.beat(slots=1)
    desk.submit(*(line(number, "a") for number in range(1, 5)), line(11, "b"), line(12, "b"))
    order = []
    while running := [name for name, each in desk.both.model.tickets.items() if each.state == "granted"]:
        order += running
        desk.release(int(running[0][1:]))
    assert order == ["r1", "r11", "r2", "r12", "r3", "r4"]
    # In the interactive order, "a" would be in the same place without its batch.
    desk.submit(ticket(20, "z"), ticket(21, "b"), ticket(22, "a"), ticket(23, "b"))
    desk.release(20)
    assert desk.state(21, 22, 23) == ["granted", "queued", "queued"]
    desk.release(21)
    assert desk.state(22, 23) == ["granted", "queued"]


def test_positions_and_estimates_do_not_see_background_tickets(desk: Desk) -> None:
    desk.beat(slots=2, adapter_slots=1, resident=("A", "B"))
    desk.submit(ticket(1, adapter="A"), ticket(2, "b", adapter="B"), ticket(3, "c", adapter="B"))
    before = desk.both.renew([("r2", None), ("r3", None)])["tickets"]
    desk.submit(*(line(number, adapter="B") for number in range(10, 20)))
    assert desk.both.renew([("r2", None), ("r3", None)])["tickets"] == before
    stats = desk.both.stats()
    assert (stats["queued"], stats["load"], stats["background"]["queued"]) == (2, 1, 10)


def test_background_tickets_do_not_keep_a_pool_awake(desk: Desk) -> None:
    desk.beat(slots=2)
    desk.submit(ticket(1))
    desk.release(1)
    desk.submit(line(2))
    desk.later(9000)
    desk.release(2)
    assert desk.both.stats()["idle_ms"] == 9000


def test_a_background_ticket_on_a_replica_that_ends_waits_again_or_is_revoked(desk: Desk) -> None:
    desk.beat(slots=2, resident=("A",))
    desk.submit(line(1, adapter="A"), line(2, adapter="B"))
    desk.both.deregister("x")
    assert desk.state(1, 2) == ["revoked", "queued"]
    desk.both.retry(line(1), "x", RetryReason.ENGINE, 0)
    assert desk.state(1, 2) == ["queued", "queued"]
    desk.beat("y", slots=1)
    assert desk.state(2) == ["loading"]
    desk.beat("y", slots=2)
    assert desk.state(1) == ["loading"]


def test_a_renewal_that_finds_the_replica_dead_reports_its_tickets_as_revoked(desk: Desk) -> None:
    desk.beat("x", slots=4)
    desk.submit(ticket(1), line(2))
    # Only these two send anything for so long that the call which renews them gives up the replica.
    for _ in range(Rules().GONE_MS // 1000 + 2):
        desk.both.at(desk.both.now + 1000)
        reports = desk.both.renew([("r1", None), ("r2", None)])["tickets"]
    assert [report["state"] for report in reports] == ["revoked", "revoked"]


def test_a_restored_background_ticket_counts_as_one(desk: Desk) -> None:
    desk.beat(slots=2)
    assert desk.both.restore(line(1), "x", 5, 0)
    assert desk.both.stats()["background"]["load"] == 1
    assert desk.submit(ticket(2), ticket(3), ticket(4)) == ["granted", "granted", "queued"]


def test_the_bound_of_waiting_background_tickets_is_their_own(valkey_url: str) -> None:
    rules = Rules(MAX_BACKGROUND_QUEUED=2)
    with Redis.from_url(valkey_url, decode_responses=True) as client:
        desk = Desk(Both(client, rules, NOW, Direct(client, library_with(rules))))
        assert desk.submit(line(1), line(2), line(3)) == ["queued", "queued", "refused_by_pool"]
        assert desk.both.submit(ticket(4), Bounds(1, 1))["state"] == "queued"


def test_room_tells_what_runners_need(desk: Desk) -> None:
    assert desk.both.room() == {"ready": 0, "slots": 0, "room": 0, "queued": 0}
    desk.beat("x", slots=4)
    desk.beat("y", slots=2)
    desk.submit(line(1), line(2, weight=2))
    assert desk.both.room() == {"ready": 2, "slots": 6, "room": 3, "queued": 0}
    desk.both.deregister("x")
    assert desk.both.room()["slots"] == 2


def test_an_engine_that_starts_is_warmed_for_lines_too(desk: Desk) -> None:
    desk.submit(line(1, adapter="B"), ticket(2, adapter="A"))
    reply = desk.both.heartbeat("x", Beat("http://engine", 4, 2, Observed.STARTING, []))
    assert reply["warm"] == {"A": "src/A", "B": "src/B"}


async def test_a_durable_ticket_of_a_dead_runner_is_waste(scheduler: Scheduler) -> None:
    pool = Pool(scheduler)
    await pool.beat(slots=2, adapter_slots=1, resident=("A", "B"))
    async with quick(scheduler, LEASE_MS=200):
        await pool.submit(line(1, adapter="A"))
        await scheduler.renew(POOL, [("r1", TokenCounts(7, 2, 3))])
        assert await pool.submit(ticket(2, adapter="B")) == ["granted"]
        assert (await pool.states())["r1"] == "yielded"

        async def lost() -> bool:
            await scheduler.stats(POOL)
            return len(await pool.events()) == 2

        await until(lost, every_s=0.02)
    events: dict[str, Any] = {event["request_id"]: event for event in await pool.events()}
    assert (events["r1"]["status"], events["r1"]["code"], events["r1"]["completion_tokens"]) == ("wasted", "runner_lost", 3)
    assert events["r1"]["replica_id"] == "x"
    assert (events["r2"]["status"], events["r2"]["code"]) == ("lost", "gateway_lost")
    await pool.check()


async def test_the_owner_of_a_ticket_that_was_put_back_hears_it_at_once(scheduler: Scheduler) -> None:
    pool, runner = Pool(scheduler), Leases(scheduler, "runner")
    await pool.beat(slots=2, adapter_slots=1, resident=("A", "B"))
    running = asyncio.create_task(runner.run())
    aborted = asyncio.Event()
    async with opened(runner, line(1, adapter="A"), Used()) as one:
        one.on_yielded(aborted.set)
        assert await pool.submit(ticket(2, adapter="B")) == ["granted"]
        await asyncio.wait_for(aborted.wait(), 5)
        assert one.yielded
    assert await pool.states() == {"r2": "granted"}
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_ticket_that_was_put_back_while_its_engine_failed_does_not_wait(scheduler: Scheduler) -> None:
    pool, runner = Pool(scheduler), Leases(scheduler, "runner")
    await pool.beat(slots=2, adapter_slots=1, resident=("A", "B"))
    async with opened(runner, line(1, adapter="A"), Used()) as one:
        lease = await one.wait(0)
        assert lease is not None
        assert await pool.submit(ticket(2, adapter="B")) == ["granted"]
        # The connection to the engine breaks before the owner receives that message.
        await one.retry(lease, RetryReason.ENGINE)
        assert one.yielded
        async with asyncio.timeout(5):
            assert await one.wait(10) is None, "at once"
    assert await pool.states() == {"r2": "granted"}


@pytest.mark.parametrize("report", [{"state": "failed"}, {"state": "load_failed", "reason": "x"}, {"state": "yielded"}])
async def test_an_end_is_heard_whatever_its_attempt(scheduler: Scheduler, report: dict[str, Any]) -> None:
    pool, runner = Pool(scheduler), Leases(scheduler, "runner")
    await pool.beat()
    async with opened(runner, line(1), Used()) as one:
        lease = await one.wait(0)
        assert lease is not None
        await one.retry(lease, RetryReason.ENGINE)
        assert one.apply(report | {"attempts": 0})
        async with asyncio.timeout(5):
            with contextlib.suppress(LmaasError):
                assert await one.wait(10) is None


async def test_a_ticket_that_was_put_back_is_not_restored_after_the_server_lost_its_memory(scheduler: Scheduler) -> None:
    pool, runner = Pool(scheduler), Leases(scheduler, "runner")
    await pool.beat(slots=2, adapter_slots=1, resident=("A", "B"))
    async with opened(runner, line(1, adapter="A"), Used()) as one:
        await pool.submit(ticket(2, adapter="B"))
        await runner.renew()
        assert one.yielded
        await scheduler.redis.flushall()
        await pool.beat(slots=1)
        await runner.renew()
        assert await pool.tickets() == {}


def test_lines_that_one_call_left_waiting_are_placed_by_the_next_request(desk: Desk) -> None:
    """A call places 32 lines at most. A request that gets its slot at once is a call that places the next ones."""
    lines = [line(number) for number in range(1, 37)]
    desk.submit(*lines)
    desk.beat(slots=40)
    assert desk.state(*range(1, 37)).count("queued") == 4
    assert desk.submit(ticket(99)) == ["granted"]
    assert desk.state(*range(1, 37)).count("queued") == 0
