"""The consequences of the end of an attempt of a line."""

import pytest

from lmaas.errors import (
    AdapterUnavailable,
    EngineFailed,
    InternalError,
    InvalidRequest,
    LmaasError,
    ModelNotFound,
    OverLimit,
    OverQuota,
    Quarantined,
    RequestFailed,
    Unavailable,
)
from lmaas.jobs.endings import MAX_FAILURES, MAX_PAUSE_S, MAX_REFUSALS, Next, Tries

QUOTA = OverQuota("no budget")


@pytest.mark.parametrize(
    ("error", "following"),
    [
        (InvalidRequest("wrong"), Next.FAILED),
        (ModelNotFound("x"), Next.FAILED),
        (OverQuota("too many tokens a minute", code="rate_limit_exceeded"), Next.FAILED),
        (OverLimit("full", code="queue_full"), Next.AGAIN),
        (Unavailable("queue", code="queue_unavailable"), Next.AGAIN),
        (Unavailable("no room"), Next.AGAIN),
        (InternalError(), Next.FAILED),
    ],
)
def test_refusals(error: LmaasError, following: Next) -> None:
    assert Tries().refused(error, others_run=False) is following


@pytest.mark.parametrize(
    ("error", "following"),
    [
        (RequestFailed(), Next.FAILED),
        (Quarantined("two engines"), Next.FAILED),
        (InvalidRequest("the engine says so"), Next.FAILED),
        (EngineFailed("gone"), Next.AGAIN),
        (AdapterUnavailable("not loaded"), Next.AGAIN),
        (Unavailable("no room"), Next.AGAIN),
    ],
)
def test_answers_with_an_error(error: LmaasError, following: Next) -> None:
    assert Tries().ended(int(error.status), error.error_code, retryable=error.retryable) is following


def test_an_answer() -> None:
    assert Tries().ended(200, None, retryable=False) is Next.DONE


@pytest.mark.parametrize("error", [EngineFailed("gone"), AdapterUnavailable("not loaded")])
def test_failures_of_engines_are_bounded(error: LmaasError) -> None:
    tries = Tries()
    found = [tries.ended(int(error.status), error.error_code, retryable=True) for _ in range(MAX_FAILURES)]
    assert found == [Next.AGAIN] * (MAX_FAILURES - 1) + [Next.FAILED]


def test_a_service_that_is_away_is_waited_for() -> None:
    tries = Tries()
    for _ in range(50):
        assert tries.refused(Unavailable("queue", code="queue_unavailable"), others_run=False) is Next.AGAIN
    assert tries.pause_s == MAX_PAUSE_S


def test_pauses_double() -> None:
    tries, pauses = Tries(), []
    for _ in range(7):
        tries.refused(Unavailable("queue"), others_run=False)
        pauses.append(tries.pause_s)
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


def test_a_spent_budget_stops_the_batch_when_nothing_else_may_give_some_back() -> None:
    tries = Tries()
    assert [tries.refused(QUOTA, others_run=True) for _ in range(10)] == [Next.AGAIN] * 10
    assert [tries.refused(QUOTA, others_run=False) for _ in range(MAX_REFUSALS)] == [Next.AGAIN] * (MAX_REFUSALS - 1) + [Next.STOP]
    other = Tries()
    other.refused(QUOTA, others_run=False)
    other.refused(QUOTA, others_run=True)
    assert other.refused(QUOTA, others_run=False) is Next.AGAIN, "it counts from the beginning"
    assert tries.pause_s == 1, "the rest of the batch waits for it"


def test_a_budget_that_is_only_reserved_is_waited_for() -> None:
    tries, pauses = Tries(), []
    for _ in range(7):
        found = [tries.refused(QUOTA, others_run=False) for _ in range(MAX_REFUSALS)]
        assert found == [Next.AGAIN] * (MAX_REFUSALS - 1) + [Next.STOP]
        tries.unspent()
        pauses.append(tries.pause_s)
    assert pauses == [2, 4, 8, 16, 30, 30, 30]
