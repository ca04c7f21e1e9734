"""The conditions of a replica, and the times since which they hold."""

from datetime import UTC, datetime

import pytest

from lmaas.control.observation import Condition, ReplicaObservation, observe_replicas
from lmaas.states import Desired, Observed
from lmaas.store.replicas import Replica

RECORDED, READY, STOPPING = Condition.RECORDED, Condition.READY, Condition.STOPPING
STRAY, BEGUN, SILENT, UNHEARD = Condition.STRAY, Condition.BEGUN, Condition.SILENT, Condition.UNHEARD


def row(name: str, observed: Observed, desired: Desired = Desired.RUNNING) -> Replica:
    return Replica(name, "p", desired, observed, None, None, datetime(2026, 1, 1, tzinfo=UTC), None, None, None)


@pytest.mark.parametrize(
    ("replica", "has_process", "load", "conditions"),
    [
        pytest.param(row("a", Observed.STARTING), True, None, {RECORDED, UNHEARD}, id="has not begun"),
        pytest.param(row("a", Observed.STARTING), False, None, {RECORDED, UNHEARD}, id="has no process either"),
        pytest.param(row("a", Observed.STARTING), True, 0, {RECORDED, BEGUN}, id="starts"),
        pytest.param(row("a", Observed.READY), True, 3, {RECORDED, READY}, id="ready"),
        pytest.param(row("a", Observed.READY), True, None, {RECORDED, READY, SILENT}, id="ready and silent"),
        pytest.param(
            row("a", Observed.READY, Desired.STOPPED), True, 1, {RECORDED, READY, STOPPING}, id="has not heard yet that it is to stop"
        ),
        pytest.param(row("a", Observed.DRAINING, Desired.STOPPED), True, 1, {RECORDED, STOPPING}, id="drains"),
        pytest.param(row("a", Observed.DRAINING, Desired.STOPPED), True, None, {RECORDED, STOPPING}, id="has left the queue"),
        pytest.param(
            row("a", Observed.STARTING, Desired.STOPPED), True, None, {RECORDED, UNHEARD, STOPPING}, id="is to stop before it began"
        ),
        pytest.param(None, True, None, {STRAY}, id="a process without a row"),
        pytest.param(None, True, 1, {STRAY}, id="a process without a row, in the queue"),
        pytest.param(None, False, 1, set(), id="only in the queue"),
    ],
)
def test_conditions(replica: Replica | None, has_process: bool, load: int | None, conditions: set[Condition]) -> None:
    rows, processes = [replica] if replica else [], {"a"} if has_process else set()
    found = observe_replicas({}, rows, processes, {} if load is None else {"a": load}, 5.0)
    assert found == {"a": ReplicaObservation("a", replica, has_process, load, since=dict.fromkeys(conditions, 5.0))}


def test_a_condition_keeps_its_beginning_and_one_that_ends_is_forgotten() -> None:
    starting, ready, stopping = row("a", Observed.STARTING), row("a", Observed.READY), row("a", Observed.READY, Desired.STOPPED)
    steps = [
        (10.0, starting, {}, {RECORDED: 10.0, UNHEARD: 10.0}),
        (11.0, starting, {}, {RECORDED: 10.0, UNHEARD: 10.0}),
        (12.0, starting, {"a": 0}, {RECORDED: 10.0, BEGUN: 12.0}),
        (13.0, starting, {}, {RECORDED: 10.0, BEGUN: 12.0, SILENT: 13.0}),
        (13.5, starting, {"a": 0}, {RECORDED: 10.0, BEGUN: 12.0}),
        (14.0, ready, {"a": 1}, {RECORDED: 10.0, READY: 14.0}),
        (15.0, ready, {}, {RECORDED: 10.0, READY: 14.0, SILENT: 15.0}),
        (16.0, stopping, {"a": 0}, {RECORDED: 10.0, READY: 14.0, STOPPING: 16.0}),
    ]
    observed: dict[str, ReplicaObservation] = {}
    for now, replica, loads, since in steps:
        observed = observe_replicas(observed, [replica], {"a"}, loads, now)
        assert observed["a"].since == since, now
    assert observe_replicas(observed, [], (), {}, 17.0) == {}
    assert observe_replicas({}, [stopping], {"a"}, {}, 18.0)["a"].since[RECORDED] == 18.0


def test_how_long_a_condition_has_held() -> None:
    replica = ReplicaObservation("a", since={RECORDED: 10.0, READY: 14.0})
    assert (replica.held_s(READY, 15.0), replica.held_s(SILENT, 15.0)) == (1.0, 0.0)
    assert replica.age_s(16.0) == 2.0, "since it was ready"
    assert ReplicaObservation("a", since={RECORDED: 10.0}).age_s(16.0) == 6.0, "since it was recorded"


def test_the_order_is_that_of_the_rows_and_then_of_the_ids() -> None:
    rows = [row("c", Observed.READY), row("a", Observed.READY)]
    assert list(observe_replicas({}, rows, {"z", "a", "b"}, {"y": 1, "c": 1}, 0.0)) == ["c", "a", "b", "y", "z"]
