"""From desired and observed replicas to steps."""

from datetime import UTC, datetime, timedelta

import pytest

from lmaas.control.plan import Action, Verb, plan
from lmaas.states import Desired, Observed
from lmaas.store.replicas import Replica

NOW = 10_000.0
TODAY = datetime(2026, 1, 1, tzinfo=UTC)
START = Action(Verb.START)


def row(name: str, observed: Observed = Observed.READY, desired: Desired = Desired.RUNNING, age_s: int = 60) -> Replica:
    return Replica(name, "p", desired, observed, None, None, TODAY - timedelta(seconds=age_s), None, None, None)


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
    actions = plan(
        desired,
        rows,
        frozenset(processes),
        loads,
        max_replicas=3,
        may_start=True,
        stop_after_s=50,
        start_after_s=600,
        unheard_since={},
        stopping_since={"d": NOW},
        unknown_since=dict.fromkeys("xy", NOW - 16),
        silent_since={},
        now=NOW,
    )
    assert actions == expected


@pytest.mark.parametrize(("rows", "processes"), [([], ""), ([A], "a"), ([A], "")])
def test_nothing_starts_while_it_backs_off(rows: list[Replica], processes: str) -> None:
    actions = plan(
        3,
        rows,
        frozenset(processes),
        {},
        max_replicas=3,
        may_start=False,
        stop_after_s=50,
        start_after_s=600,
        unheard_since={},
        stopping_since={},
        unknown_since={},
        silent_since={},
        now=NOW,
    )
    assert START not in actions


@pytest.mark.parametrize(
    ("since", "expected"),
    [
        ({}, []),
        ({"d": NOW - 50}, []),
        ({"d": NOW - 51}, [kill("d")]),
        ({"a": NOW - 51}, []),  # desired
    ],
)
def test_what_does_not_stop_is_killed(since: dict[str, float], expected: list[Action]) -> None:
    actions = plan(
        1,
        [A, STOPPING],
        frozenset("ad"),
        {},
        max_replicas=3,
        may_start=True,
        stop_after_s=50,
        start_after_s=600,
        unheard_since={},
        stopping_since=since,
        unknown_since={},
        silent_since={},
        now=NOW,
    )
    assert actions == expected


@pytest.mark.parametrize(("since", "expected"), [({}, []), ({"x": NOW - 15}, []), ({"x": NOW - 16}, [kill("x")])])
def test_one_that_has_just_ended_may_be_on_its_way_out(since: dict[str, float], expected: list[Action]) -> None:
    actions = plan(
        0,
        [],
        frozenset("x"),
        {},
        max_replicas=3,
        may_start=True,
        stop_after_s=50,
        start_after_s=600,
        unheard_since={},
        stopping_since={},
        unknown_since=since,
        silent_since={},
        now=NOW,
    )
    assert actions == expected


@pytest.mark.parametrize(
    ("since", "expected"),
    [
        ({}, []),
        ({"s": NOW - 600}, []),
        ({"s": NOW - 601}, [Action(Verb.GIVE_UP, "s")]),
        ({"a": NOW - 601}, []),  # it was ready
        ({"d": NOW - 601}, []),  # nobody desires it any more: it is killed with what else does not stop
    ],
)
def test_one_whose_supervisor_never_begins_is_given_up(since: dict[str, float], expected: list[Action]) -> None:
    actions = plan(
        2,
        [A, STARTING, STOPPING],
        frozenset("asd"),
        {},
        max_replicas=3,
        may_start=True,
        stop_after_s=50,
        start_after_s=600,
        unheard_since=since,
        stopping_since={},
        unknown_since={},
        silent_since={},
        now=NOW,
    )
    assert actions == expected
