"""The reported wait of queued tickets: it counts down, and grows when something takes longer than usual."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from redis import Redis

from lmaas.scheduling.client import Beat, Bounds
from lmaas.scheduling.states import RetryReason
from lmaas.states import Observed
from tests.integration.scheduling.build import ticket
from tests.integration.scheduling.model.data import Rules
from tests.integration.scheduling.side_by_side import Both, Direct, library_with

BOUNDS = Bounds(100, 1000)
NOW = 1_800_000_000_000
START_S, TURN_S = Rules().START_MS // 1000, Rules().TURN_MS // 1000


@dataclass
class Waits:
    """The scheduler beside its model, with a clock of the test's own."""

    both: Both
    state: str = "starting"

    def after(self, seconds: float, *, beats: bool = True, start_ms: int | None = None) -> None:
        """Let time pass; the replica, if there is one, sends heartbeats meanwhile, and gateways renew."""
        until = self.both.now + round(seconds * 1000)
        while self.both.now < until:
            self.both.at(min(until, self.both.now + 1000))
            if beats:
                self.beat(start_ms=start_ms)
            else:
                self.renew()

    def beat(self, state: str | None = None, start_ms: int | None = None) -> None:
        self.state = state or self.state
        self.both.heartbeat("x", Beat("http://engine", 2, 1, Observed(self.state), [], start_ms=start_ms))
        self.renew()

    def renew(self) -> None:
        if self.both.model.tickets:
            self.both.renew([(name, None) for name in self.both.model.tickets])

    def submit(self, number: int, tenant: str = "a") -> Any:
        return self.both.submit(ticket(number, tenant), BOUNDS)

    def report(self, number: int) -> dict[str, Any]:
        [report] = self.both.renew([(f"r{number}", None)])["tickets"]
        return {name: report[name] / 1000 if name.endswith("_ms") else report[name] for name in report}

    def told(self, number: int = 1) -> tuple[str, float, float]:
        """Return phase, estimated wait and lateness, in seconds."""
        report = self.report(number)
        return report["phase"], report["wait_ms"], report["late_ms"]


@pytest.fixture
def waits(valkey_url: str) -> Iterator[Waits]:
    with Redis.from_url(valkey_url, decode_responses=True) as client:
        yield Waits(Both(client, Rules(), NOW, Direct(client, library_with(Rules()))))


def test_before_an_engine_starts_it_counts_down_and_then_grows(waits: Waits) -> None:
    first = waits.submit(1)
    assert (first["phase"], first["wait_ms"], first["assumed"]) == ("asked", START_S * 1000, True)
    waits.after(5, beats=False)
    assert waits.told() == ("asked", START_S - 5, 0)
    waits.submit(2)
    assert waits.told(2) == ("asked", START_S - 5, 0), "the engine was requested when the first ticket came"
    waits.after(START_S - 5, beats=False)
    assert waits.told() == ("asked", 1, 0)
    waits.after(30, beats=False)
    assert waits.told() == ("asked", 30, 30)


def test_a_start_counts_down_by_its_own_time(waits: Waits) -> None:
    waits.submit(1)
    waits.after(12, beats=False)
    waits.beat()
    assert waits.told() == ("starting", START_S, 0)
    waits.after(8)
    assert waits.told() == ("starting", START_S - 8, 0)
    seen = []
    for _ in range(120):
        waits.after(1)
        seen.append(waits.told()[1])
    assert seen[:11] == [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert seen[13:] == [float(late) for late in range(2, 109)], "the estimate never stands still"
    assert waits.told() == ("starting", 108, 108)
    waits.beat("ready")
    assert waits.report(1)["state"] == "granted"


def test_what_is_known_of_starts_is_used(waits: Waits) -> None:
    waits.submit(1)
    waits.beat()
    assert waits.report(1)["assumed"]
    waits.beat(start_ms=5000)
    assert (waits.report(1)["assumed"], waits.told()) == (False, ("starting", 5, 0))
    waits.after(3)
    assert waits.told() == ("starting", 2, 0)
    waits.after(10)
    assert waits.told() == ("starting", 8, 8)


def test_a_start_that_happens_to_take_what_is_assumed_is_known_too(waits: Waits) -> None:
    waits.submit(1)
    waits.beat(start_ms=START_S * 1000)
    assert not waits.report(1)["assumed"]


def test_after_a_failed_start_the_wait_is_late(waits: Waits) -> None:
    waits.submit(1)
    waits.beat(start_ms=5000)
    waits.after(4)
    assert waits.told() == ("starting", 1, 0)
    waits.both.deregister("x")
    waits.after(5, beats=False)
    assert waits.told() == ("asked", 4, 4)
    waits.beat()
    assert waits.told() == ("starting", 5, 0), "a new start has begun"


def test_a_supervisor_knows_better_what_is_left_of_its_start(waits: Waits) -> None:
    waits.submit(1)
    waits.beat(start_ms=2000)

    def beat(left_s: float, late_s: float = 0.0) -> None:
        left_ms, late_ms = round(1000 * left_s), round(1000 * late_s)
        waits.both.heartbeat("x", Beat("http://engine", 2, 1, Observed.STARTING, [], left_ms=left_ms, late_ms=late_ms))

    beat(250)  # the zygote has just begun to import on a busy CPU
    assert waits.told() == ("starting", 250, 0)
    waits.after(3, beats=False)
    assert waits.told() == ("starting", 247, 0), "the estimate counts down between two reports"
    beat(80)
    assert waits.told() == ("starting", 80, 0)
    beat(30, late_s=10)
    assert waits.told() == ("starting", 30, 10)
    beat(0.4)
    assert waits.told() == ("starting", 0.4, 0)
    waits.beat()
    assert waits.told() == ("starting", 1, 1), "by the clock again"


def test_before_an_engine_starts_a_delay_of_all_starts_counts(waits: Waits) -> None:
    waits.both.stats(delay_ms=9000)
    waits.submit(1)
    assert waits.told() == ("asked", START_S + 9, 0)
    waits.after(2, beats=False)
    assert waits.told() == ("asked", START_S + 9 - 2, 0)
    waits.both.stats()
    assert waits.told() == ("asked", START_S - 2, 0)


def test_a_first_start_takes_as_long_as_the_controller_expects(waits: Waits) -> None:
    waits.both.stats(delay_ms=6000, first_ms=3000)
    waits.submit(1)
    assert waits.told() == ("asked", 9, 0)
    waits.beat()
    assert waits.told() == ("starting", 3, 0)


def test_the_start_that_ends_first_counts(waits: Waits) -> None:
    waits.submit(1)
    waits.beat()
    waits.after(15)
    waits.both.heartbeat("y", Beat("http://other", 2, 1, Observed.STARTING, []))
    assert waits.told() == ("starting", 5, 0)


def test_a_queue_behind_busy_engines(waits: Waits) -> None:
    waits.beat("ready")
    for number in range(1, 9):
        waits.submit(number)
    assert [waits.told(number)[1] for number in range(3, 9)] == [2, 2, 4, 4, 6, 6]
    waits.after(1)
    assert waits.told(3) == ("busy", 1, 0)
    assert waits.told(8) == ("busy", 5, 0)
    waits.after(60)
    assert waits.told(3) == ("busy", 59, 59), "the running ticket takes longer than usual"
    assert waits.told(8) == ("busy", 63, 59)
    waits.both.release(ticket(1), None, None, None)
    assert waits.told(4) == ("busy", 2, 0), "a turn has ended, and the next one begins"
    assert not waits.report(4)["assumed"]


def test_a_full_pool_says_when_to_come_again(waits: Waits) -> None:
    waits.submit(1)
    waits.after(7, beats=False)
    refused = waits.both.submit(ticket(2, "b"), Bounds(100, 1))
    assert refused == {"state": "refused_by_pool", "wait_ms": (START_S - 7) * 1000}


def test_a_clock_set_back_leaves_no_estimate_from_the_future(waits: Waits) -> None:
    waits.beat("ready")
    for number in range(1, 4):
        waits.submit(number)
    waits.both.at(NOW - 3_600_000)
    waits.beat()
    assert waits.told(3) == ("busy", 2, 0)


def test_a_position_is_by_turns_of_the_tenants(waits: Waits) -> None:
    for number in range(1, 6):
        waits.submit(number)
    for number in (6, 7):
        waits.submit(number, "b")
    waits.submit(8, "c")
    positions = {number: waits.report(number)["position"] for number in range(1, 9)}
    assert positions == {1: 1, 6: 2, 8: 3, 2: 4, 7: 5, 3: 6, 4: 7, 5: 8}, "another tenant's queue is not before one's own turn"


def test_what_came_back_is_first(waits: Waits) -> None:
    waits.beat("ready")
    for number in range(1, 5):
        waits.submit(number)
    waits.both.retry(ticket(2), "x", RetryReason.ENGINE, 0)
    assert {number: waits.report(number)["position"] for number in (2, 3, 4)} == {2: 1, 3: 2, 4: 3}
