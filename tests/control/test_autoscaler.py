"""The autoscaler's decisions."""

import pytest

from lmaas.control.autoscaler import BACKOFF_MAX_S, Demand, Policy, Scale, backoff_s, decide

NOW = 10_000.0
POLICY = Policy(min_replicas=0, max_replicas=3, idle_timeout_s=300, slots=4)
BUSY, IDLE = 0.0, 1000.0


@pytest.mark.parametrize(
    ("queued", "running", "idle_s", "current", "low_since", "expected"),
    [
        # up: at once, as many as there is work for, no more than allowed
        (1, 0, BUSY, 0, None, Scale(1, None)),
        (4, 0, BUSY, 0, None, Scale(1, None)),
        (5, 0, BUSY, 0, None, Scale(2, None)),
        (3, 4, BUSY, 1, None, Scale(2, None)),
        (1000, 12, BUSY, 1, None, Scale(3, None)),
        (5, 0, BUSY, 1, NOW - 1000, Scale(2, None)),
        # as many as are needed
        (0, 4, BUSY, 1, NOW - 1000, Scale(1, None)),
        (0, 0, IDLE, 0, None, Scale(0, None)),
        # down to some: only after the timeout
        (0, 1, BUSY, 3, None, Scale(3, NOW)),
        (0, 1, BUSY, 3, NOW - 299, Scale(3, NOW - 299)),
        (0, 1, BUSY, 3, NOW - 300, Scale(1, None)),
        (0, 5, BUSY, 3, NOW - 300, Scale(2, None)),
        # down to none: the pool's own memory of its last request counts
        (0, 0, 10, 1, None, Scale(1, NOW - 10)),
        (0, 0, 299, 1, None, Scale(1, NOW - 299)),
        (0, 0, 300, 1, None, Scale(0, None)),
        (0, 0, 300, 3, None, Scale(0, None)),
        (0, 0, 10, 1, NOW - 400, Scale(1, NOW - 400)),
    ],
)
def test_decide(queued: int, running: int, idle_s: float, current: int, low_since: float | None, expected: Scale) -> None:
    assert decide(Demand(queued, running, idle_s), POLICY, current, low_since, NOW) == expected


@pytest.mark.parametrize(
    ("low", "high", "queued", "idle_s", "current", "replicas"),
    [
        (1, 3, 0, IDLE, 0, 1),
        (1, 3, 0, IDLE, 1, 1),
        (2, 2, 100, BUSY, 0, 2),
        (0, 0, 100, BUSY, 0, 0),
        pytest.param(0, 1, 100, BUSY, 3, 1),  # the operator has lowered the bound
        pytest.param(0, 0, 100, BUSY, 1, 0),
    ],
)
def test_bounds(low: int, high: int, queued: int, idle_s: float, current: int, replicas: int) -> None:
    assert decide(Demand(queued, 0, idle_s), Policy(low, high, 300, 4), current, None, NOW).replicas == replicas


def test_a_pool_that_becomes_idle_step_by_step() -> None:
    low_since = None
    current = 3
    seen = []
    for second in range(0, 1000, 10):
        # Four requests run until 400; then there are none.
        running = 4 if second < 400 else 0
        idle_s = 0.0 if second < 400 else second - 400.0
        scale = decide(Demand(0, running, idle_s), POLICY, current, low_since, NOW + second)
        current, low_since = scale.replicas, scale.low_since
        seen.append((second, current))
    assert [current for _, current in seen] == [3] * 30 + [1] * 40 + [0] * 30


def test_a_pool_that_flickers_does_not_keep_more_than_it_needs() -> None:
    low_since, current = None, 3
    for second in range(0, 420, 10):
        busy = second % 20 == 0
        scale = decide(Demand(0, 1 if busy else 0, 0.0 if busy else 10.0), POLICY, current, low_since, NOW + second)
        current, low_since = scale.replicas, scale.low_since
    assert current == 1


@pytest.mark.parametrize(("failures", "seconds"), [(0, 0), (1, 5), (2, 10), (3, 20), (6, 160), (7, 300), (50, 300)])
def test_backoff(failures: int, seconds: float) -> None:
    assert backoff_s(failures) == seconds <= BACKOFF_MAX_S


def test_backoff_has_no_end() -> None:
    assert backoff_s(5000) == BACKOFF_MAX_S
