"""From desired and observed replicas to steps."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from lmaas.control.observation import Condition, Replicas, observe_replicas
from lmaas.control.plan import Action, PlanLimits, Verb, plan
from lmaas.states import Desired, Observed
from lmaas.store.replicas import Replica

NOW = 10_000.0
TODAY = datetime(2026, 1, 1, tzinfo=UTC)
START = Action(Verb.START)
LIMITS = PlanLimits(max_replicas=3, may_start=True, stop_after_s=50, start_after_s=600)


def row(name: str, observed: Observed = Observed.READY, desired: Desired = Desired.RUNNING, age_s: int = 60) -> Replica:
    return Replica(name, "p", desired, observed, None, None, TODAY - timedelta(seconds=age_s), None, None, None)


def observed(
    rows: list[Replica], processes: str, loads: Mapping[str, int] | None = None, began: Mapping[str, tuple[Condition, float]] | None = None
) -> Replicas:
    """Return the replicas. `began` replaces NOW as the time at which a condition of a replica began. All ready ones send heartbeats."""
    loads = {row.id: 0 for row in rows if row.observed == Observed.READY} | dict(loads or {})
    found = observe_replicas({}, rows, processes, loads, NOW)
    for name, (condition, at) in (began or {}).items():
        found[name] = replace(found[name], since=dict(found[name].since) | {condition: at})
    return found


def test_the_replica_with_the_least_background_work_stops_first() -> None:
    found = observe_replicas({}, [A, B, C], "abc", {"a": 0, "b": 0, "c": 1}, NOW, {"a": 2, "b": 7})
    assert plan(1, found, LIMITS, NOW) == [stop("a"), stop("b")]


def stop(name: str) -> Action:
    return Action(Verb.STOP, name)


def kill(name: str) -> Action:
    return Action(Verb.KILL, name)


def lose(name: str) -> Action:
    return Action(Verb.LOSE, name)


A, B, C = row("a", age_s=300), row("b", age_s=200), row("c", age_s=100)
STARTING = row("s", Observed.STARTING, age_s=400)
STOPPING = row("d", Observed.DRAINING, Desired.STOPPED)


@pytest.mark.parametrize(
    ("desired", "rows", "processes", "loads", "expected"),
    [
        pytest.param(0, [], "", {}, [], id="nothing"),
        pytest.param(1, [], "", {}, [START], id="from zero"),
        pytest.param(2, [A], "a", {}, [START], id="one more"),
        pytest.param(1, [A], "a", {}, [], id="as it should be"),
        pytest.param(1, [STARTING], "s", {}, [], id="one is starting already"),
        pytest.param(0, [A], "a", {}, [stop("a")], id="to zero"),
        pytest.param(0, [STARTING], "s", {}, [stop("s")], id="not wanted before it was ready"),
        pytest.param(0, [STOPPING], "d", {}, [], id="stops already"),
        pytest.param(2, [A, B, C], "abc", {"a": 3, "b": 1, "c": 2}, [stop("b")], id="the least busy"),
        pytest.param(1, [A, B, C], "abc", {"a": 3, "b": 1, "c": 2}, [stop("b"), stop("c")], id="the two least busy"),
        pytest.param(2, [A, B, C], "abc", {}, [stop("c")], id="of equals the youngest"),
        pytest.param(2, [A, STARTING, C], "asc", {}, [stop("s")], id="of equals the one that is not ready"),
        pytest.param(2, [A, STARTING, C], "asc", {"s": 1, "a": 1}, [stop("c")], id="but rather an idle one"),
        pytest.param(1, [A], "", {}, [lose("a"), START], id="its process is gone"),
        pytest.param(0, [STOPPING], "", {}, [lose("d")], id="its process is gone while it stops"),
        pytest.param(1, [A], "ax", {}, [kill("x")], id="nobody's process"),
        pytest.param(0, [], "yx", {}, [kill("x"), kill("y")], id="nobody's processes"),
        pytest.param(3, [A, STOPPING], "ad", {}, [START], id="one that drains has its memory still"),
        pytest.param(3, [A, B, STOPPING], "abd", {}, [], id="no room"),
        pytest.param(9, [], "", {}, [START] * 3, id="no more than allowed"),
    ],
)
def test_plan(desired: int, rows: list[Replica], processes: str, loads: dict[str, int], expected: list[Action]) -> None:
    strays = dict.fromkeys(sorted(set(processes) & set("xy")), (Condition.STRAY, NOW - 16))
    assert plan(desired, observed(rows, processes, loads, strays), LIMITS, NOW) == expected


@pytest.mark.parametrize(("rows", "processes"), [([], ""), ([A], "a"), ([A], "")])
def test_nothing_starts_while_it_backs_off(rows: list[Replica], processes: str) -> None:
    assert START not in plan(3, observed(rows, processes), replace(LIMITS, may_start=False), NOW)


@pytest.mark.parametrize(
    ("name", "condition", "held_s", "expected"),
    [
        pytest.param("d", Condition.STOPPING, 50, [], id="it may take so long to stop"),
        pytest.param("d", Condition.STOPPING, 51, [kill("d")], id="it does not stop"),
        pytest.param("a", Condition.SILENT, 90, [], id="its supervisor may be silent for so long"),
        pytest.param("a", Condition.SILENT, 91, [kill("a")], id="its supervisor is stuck"),
        pytest.param("s", Condition.SILENT, 91, [kill("s")], id="its supervisor is stuck while its engine starts"),
        pytest.param("s", Condition.UNHEARD, 600, [], id="it may take so long to begin"),
        pytest.param("s", Condition.UNHEARD, 601, [Action(Verb.GIVE_UP, "s")], id="it never begins"),
        pytest.param("x", Condition.STRAY, 15, [], id="it may be on its way out"),
        pytest.param("x", Condition.STRAY, 16, [kill("x")], id="it does not end by itself"),
        pytest.param("a", Condition.READY, 1e9, [], id="it may be ready for ever"),
        pytest.param("s", Condition.RECORDED, 1e9, [], id="and exist for ever"),
    ],
)
def test_what_has_lasted_for_too_long(name: str, condition: Condition, held_s: float, expected: list[Action]) -> None:
    replicas = observed([A, STARTING, STOPPING], "asdx", began={name: (condition, NOW - held_s)})
    assert plan(2, replicas, LIMITS, NOW) == expected


def test_one_that_only_the_queue_knows_is_taken_out_of_it() -> None:
    assert plan(1, observed([A], "a", {"a": 1, "ghost": 2}), LIMITS, NOW) == [Action(Verb.DEREGISTER, "ghost")]


def test_one_that_never_began_and_is_to_stop_is_killed_and_not_given_up() -> None:
    both = row("s", Observed.STARTING, Desired.STOPPED)
    replicas = observe_replicas({}, [both], "s", {}, NOW)
    assert plan(0, replicas, LIMITS, NOW + 601) == [kill("s")]
