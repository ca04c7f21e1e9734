"""The consequences of a run's error, and the log of a run's events."""

import asyncio
import math

import pytest

from lmaas.errors import (
    AdapterUnavailable,
    EngineFailed,
    InternalError,
    InvalidRequest,
    LmaasError,
    NotFound,
    OverLimit,
    OverQuota,
    Quarantined,
    RequestFailed,
    Unauthenticated,
    Unavailable,
)
from lmaas.jobs.background import MAX_FAILURES, MAX_PAUSE_S, MIN_PAUSE_S, Overdue, RunnersLost, attempt_id, judge
from lmaas.jobs.event_writer import MAX_LOG_BYTES, MAX_WAITING_BYTES, EventSink
from lmaas.store.background import Lease, Run
from lmaas.store.event_logs import Piece

EVENT = b"event: x\ndata: {}\n\n"
LEASE = Lease("ten_1", "resp_1", "run_1", 1)


@pytest.mark.parametrize(
    "error",
    [
        InternalError(),
        InvalidRequest("x"),
        NotFound("x"),
        OverQuota("x", retry_after_s=5),
        Quarantined("x"),
        RequestFailed(),
        Unauthenticated(),
        Overdue(),
        RunnersLost(),
    ],
)
@pytest.mark.parametrize("failures", [0, 1])
def test_what_does_not_pass_ends_the_response(error: LmaasError, failures: int) -> None:
    assert judge(error, failures).pause_s is None


@pytest.mark.parametrize("failures", [0, MAX_FAILURES - 1, 100])
@pytest.mark.parametrize(("retry_after_s", "pause_s"), [(None, MIN_PAUSE_S), (0.1, MIN_PAUSE_S), (7, 7), (1000, MAX_PAUSE_S)])
@pytest.mark.parametrize("kind", [OverLimit, Unavailable])
def test_what_passes_is_waited_for_without_end(
    kind: type[OverLimit | Unavailable], retry_after_s: float | None, pause_s: float, failures: int
) -> None:
    verdict = judge(kind("x", retry_after_s=retry_after_s), failures)
    assert verdict.pause_s is not None
    assert math.isclose(verdict.pause_s, pause_s)
    assert not verdict.counts


@pytest.mark.parametrize("kind", [EngineFailed, AdapterUnavailable])
def test_an_engine_may_fail_some_times(kind: type[LmaasError]) -> None:
    verdicts = [judge(kind("x"), failures) for failures in range(MAX_FAILURES)]
    assert [verdict.pause_s for verdict in verdicts] == [1, 2, None]
    assert [verdict.counts for verdict in verdicts] == [True, True, False]


def test_the_ids_of_attempts() -> None:
    assert [attempt_id("resp_0a", attempt) for attempt in (1, 2, 12)] == ["req_0a", "req_0a_2", "req_0a_12"]


def sink(*, is_streamed: bool = True, next_event: int = 2) -> EventSink:
    return EventSink(LEASE, Run("key", None, None, b"", b"", b"", is_streamed, next_event, 0, 0, False))


async def test_pieces_have_consecutive_numbers() -> None:
    log = sink(next_event=7)
    assert log.next_piece() is None
    await log.write(EVENT * 3)
    await log.write(EVENT)
    assert log.next_piece() == Piece(7, 10, EVENT * 4)
    # A piece stays the same until it is logged, whatever follows.
    await log.write(EVENT * 2)
    assert log.next_piece() == Piece(7, 10, EVENT * 4)
    log.logged()
    assert log.next_piece() == Piece(11, 12, EVENT * 2)
    await log.finish(EVENT)
    assert log.rest() == [Piece(11, 12, EVENT * 2), Piece(13, 13, EVENT)]
    assert log.rest() == []
    assert log.next_event == 14


async def test_without_a_stream_only_the_beginning_is_recorded() -> None:
    log = sink(is_streamed=False)
    await log.write(b"")
    assert log.next_piece() is None
    await log.write(EVENT)
    assert log.next_piece() == Piece(2, 1, b"")
    log.logged()
    await log.write(EVENT)
    await log.finish(EVENT)
    assert (log.next_piece(), log.rest(), log.next_event) == (None, [], 2)
    assert log.is_whole


async def test_a_log_that_would_be_too_large_is_not_continued() -> None:
    log = sink()
    large = b"x" * (MAX_LOG_BYTES // 2 - len(EVENT)) + EVENT
    for _ in range(2):
        log.add(large)
        assert log.next_piece() is not None
        log.logged()
    assert log.next_event == 4
    log.add(EVENT)
    log.add(EVENT)
    assert (log.is_whole, log.next_event, log.rest()) == (False, 4, [])


@pytest.mark.parametrize("ending", ["logged", "left"])
async def test_an_engine_waits_while_too_much_waits_for_postgres(ending: str) -> None:
    log = sink()
    writing = asyncio.create_task(log.write(b"x" * MAX_WAITING_BYTES + EVENT))
    await asyncio.sleep(0)
    assert not writing.done()
    if ending == "logged":
        assert log.next_piece() is not None
        log.logged()
    else:
        log.leave()
    await asyncio.wait_for(writing, 5)
    await asyncio.wait_for(log.write(EVENT), 5)
