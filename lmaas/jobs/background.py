"""Runs responses in the background: leases them, runs them like interactive requests, and stores each end once."""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from http import HTTPStatus
from typing import TypeVar

from lmaas.errors import InternalError, LmaasError, OverLimit, Quarantined, Unauthenticated, Unavailable
from lmaas.http import parse_json
from lmaas.inference.observers import Observers
from lmaas.inference.protocol import Inference
from lmaas.inference.serving import Inferences
from lmaas.inference.work import DETACHED
from lmaas.jobs.event_writer import EventSink, EventWriter
from lmaas.jobs.keys import Keys
from lmaas.jobs.metrics import JobMetrics
from lmaas.jobs.runner import until_set
from lmaas.metering.usage import UsageRecord
from lmaas.protocols.responses.background import BackgroundAnswer, BackgroundResponses, failure_event, run_of, status_of, with_status
from lmaas.protocols.responses.request import ResponsesRequest
from lmaas.protocols.responses.stored import response_row, turn_items
from lmaas.states import BackgroundStatus, UsageStatus
from lmaas.store import background
from lmaas.store.background import Ending, Lease, Run
from lmaas.store.database import Database
from lmaas.store.runners import LeaseLost

log = logging.getLogger(__name__)

#: The interval at which a runner looks for new responses, and for those of its own that were cancelled.
LOOK_S = 0.5
#: The responses that one runner runs at a time, and about the bytes of them, which it holds in memory.
MAX_RESPONSES = 256
MAX_BYTES = 128 * 1024 * 1024
#: Failures of engines, or of this service, after which a response is not tried again.
MAX_FAILURES = 3
#: The runners that may die while they run a response. After that it is not tried again, because it may be the reason.
MAX_LOSSES = 5
#: The bounds of the pause before a response is tried again.
MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
#: The pause before an end is stored again that Postgres did not take.
AGAIN_S = 1.0

T = TypeVar("T")

#: Ends of runs that are no ends of responses, in the metrics: it runs again, or it was cancelled or deleted, or its lease was lost.
RETRIED, ABORTED = "retried", "aborted"


class Overdue(LmaasError):
    """A response did not run within its deadline."""

    kind, status, code = "expired", HTTPStatus.GATEWAY_TIMEOUT, "response_expired"

    def __init__(self) -> None:
        super().__init__("The response could not run within its deadline. Create it again.")


class RunnersLost(LmaasError):
    """Too many job runners died while they ran a response."""

    kind, code = "runners_lost", "runners_lost"

    def __init__(self) -> None:
        super().__init__(f"{MAX_LOSSES} processes died while they ran this response, so it is not tried again.")


def attempt_id(response_id: str, attempt: int) -> str:
    """Return the id of an attempt, by which the ledger counts it. The first one has that of the request."""
    request_id = f"req_{response_id.removeprefix('resp_')}"
    return request_id if attempt == 1 else f"{request_id}_{attempt}"


@dataclass(frozen=True, slots=True)
class _Failure:
    """The consequence of a failed run: another one after a pause, or, if `pause_s` is None, the end."""

    error: LmaasError
    pause_s: float | None = None
    #: True if the response itself may be the reason, so that it is not tried without end.
    counts: bool = False


def judge(error: LmaasError, failures: int) -> _Failure:
    """Decide what follows from the error of a run, after so many earlier failures.

    A lack of capacity, a limit per minute and a service that is away pass. An engine that fails may do so because of the response.
    """
    pause_s = min(max(error.retry_after_s or 0, MIN_PAUSE_S), MAX_PAUSE_S)
    if not error.retryable or isinstance(error, Quarantined):
        return _Failure(error)
    if isinstance(error, OverLimit | Unavailable):
        return _Failure(error, pause_s)
    if failures + 1 >= MAX_FAILURES:
        return _Failure(error)
    return _Failure(error, pause_s * 2**failures, counts=True)


@dataclass(frozen=True, slots=True)
class _Served:
    """A run that was accepted."""

    record: UsageRecord
    answer: BackgroundAnswer


class BackgroundRuns:
    """The responses in the background that one job runner runs."""

    def __init__(
        self,
        db: Database,
        inferences: Inferences,
        protocol: BackgroundResponses,
        keys: Keys,
        metrics: JobMetrics,
        kept_for: timedelta,
        observers: Observers,
    ) -> None:
        self._db, self._inferences, self._protocol, self._observers = db, inferences, protocol, observers
        self._keys, self._metrics, self._kept_for = keys, metrics, kept_for
        self._running: dict[Lease, asyncio.Task[None]] = {}
        self._sinks: dict[Lease, EventSink] = {}

    @property
    def running(self) -> int:
        """The number of responses that are leased now."""
        return len(self._running)

    async def run(self, runner_id: str, stopping: asyncio.Event) -> None:
        """Lease responses for this runner and run them, until `stopping` is set; then give back what has not ended.

        When it is cancelled, because the runner has lost its leases, nothing more is written. Raises LeaseLost.
        """
        writer = EventWriter(self._db, runner_id)
        try:
            async with asyncio.TaskGroup() as group:
                writing = group.create_task(writer.run(), name="event-log")
                while not stopping.is_set():
                    try:
                        await self._look(runner_id, writer, group)
                    except Unavailable as error:
                        log.warning("background responses cannot be leased now", extra={"action": "lease", "detail": str(error)})
                    await until_set(stopping, LOOK_S)
                for task in (*self._running.values(), writing):
                    task.cancel()
                await asyncio.gather(*self._running.values(), writing, return_exceptions=True)
        except* LeaseLost as lost:
            raise lost.exceptions[0] from None
        # Unfinished responses are free again at once. If Postgres is away, they are free when the runner is declared lost.
        with suppress(Unavailable):
            for lease in await background.leased(self._db, runner_id):
                await background.give_back(self._db, lease)

    async def _look(self, runner_id: str, writer: EventWriter, group: asyncio.TaskGroup) -> None:
        """Lease what waits, and end the runs whose responses were cancelled or deleted, or whose leases are lost."""
        before = list(self._running)
        leased = await background.leased(self._db, runner_id)
        for lease in before:
            sink = self._sinks.get(lease)
            if sink is not None and leased.get(lease, True):
                sink.leave()
        for lease in leased.keys() - self._running.keys():
            # It was leased although Postgres did not reply, or its run has just ended: then this has no effect.
            if leased[lease]:
                await background.settle(self._db, lease, None)
            else:
                await background.give_back(self._db, lease)
        free_bytes = MAX_BYTES - sum(lease.size_bytes for lease in self._running)
        if len(self._running) < MAX_RESPONSES and free_bytes > 0:
            for lease in await background.claim(self._db, runner_id, MAX_RESPONSES - len(self._running), free_bytes):
                task = group.create_task(self._attempt(lease, writer), name=attempt_id(lease.id, lease.attempt))
                self._running[lease] = task
                task.add_done_callback(functools.partial(self._ended, lease))

    def _ended(self, lease: Lease, _: "asyncio.Task[None]") -> None:
        del self._running[lease]

    async def _attempt(self, lease: Lease, writer: EventWriter) -> None:
        """Run a response once, and store what came of it."""
        try:
            run = await _persisted(lambda: background.begin(self._db, lease))
            if run is None:
                # It was cancelled or deleted before it ran.
                await _persisted(lambda: background.settle(self._db, lease, None))
            else:
                await self._run(lease, run, writer)
        except Exception as error:
            # One response must not end the runner, nor be tried again without end.
            extra = {"request_id": attempt_id(lease.id, lease.attempt), "tenant_id": lease.tenant_id, "action": "background"}
            log.exception("unexpected error", extra=extra | {"detail": type(error).__name__})
            await _persisted(lambda: background.give_back(self._db, lease, delay_s=MIN_PAUSE_S, failed=True))

    async def _run(self, lease: Lease, run: Run, writer: EventWriter) -> None:
        sink = self._sinks[lease] = EventSink(lease, run)
        writer.add(sink)
        try:
            served, error = await self._served(lease, run, sink)
        finally:
            writer.remove(sink)
            del self._sinks[lease]
        # Events that the writer has begun to log are logged, or known to be left.
        async with writer.turn:
            pass
        if error is not None:
            await self._fail(lease, run, sink, served, error)
        elif served is not None and served.record.status is UsageStatus.COMPLETED:
            await self._complete(lease, run, sink, served)
        else:
            await self._settle(lease, served)

    async def _served(self, lease: Lease, run: Run, sink: EventSink) -> tuple[_Served | None, LmaasError | None]:
        """Serve a response. Returns what was accepted, and the error with which it ended. Both are None if it was cancelled before."""
        principal = inference = None
        try:
            if run.is_overdue:
                raise Overdue
            if run.losses >= MAX_LOSSES:
                raise RunnersLost
            if run.failures >= MAX_FAILURES:
                raise InternalError
            principal = await self._keys(lease.tenant_id, run.key_id)
            if principal is None:
                raise Unauthenticated("The API key that created this response has been revoked.")
            inference = self._inference(lease, run)
            self._observers.attempt_began(inference)
            await self._inferences.serve(principal, inference, sink)
        except LmaasError as error:
            if principal is not None and inference is not None:
                self._observers.attempt_ended("background", principal, inference, lease.id, error.error_code)
            return None, error
        record, answer = getattr(inference, "record", None), getattr(inference, "answer", None)
        if record is None or not isinstance(answer, BackgroundAnswer):
            return None, None
        self._observers.attempt_ended("background", principal, inference, lease.id)
        return _Served(record, answer), answer.failure

    def _inference(self, lease: Lease, run: Run) -> Inference[ResponsesRequest]:
        request = self._protocol.read(parse_json(run.request, texts=self._protocol.texts))
        # Always streamed, so that the tokens of a run that dies are known.
        request.stream = True
        request.run = run_of(lease.id, run.body, run.next_event)
        return Inference(attempt_id(lease.id, lease.attempt), self._protocol, request, DETACHED)

    async def _fail(self, lease: Lease, run: Run, sink: EventSink, served: _Served | None, error: LmaasError) -> None:
        """Have the response run again, or end it as failed."""
        verdict = judge(error, run.failures)
        if verdict.pause_s is not None:
            pause_s = verdict.pause_s
            await _persisted(lambda: background.give_back(self._db, lease, delay_s=pause_s, failed=verdict.counts))
            self._metrics.response(RETRIED)
            return
        if served is None:
            body = with_status(run.body, BackgroundStatus.FAILED, error)
            sink.add(failure_event(sink.next_event, body))
        else:
            sink.add(served.answer.failure_events(error))
            body = served.answer.response()
        await self._finish(lease, run, sink, served, BackgroundStatus.FAILED, body)

    async def _complete(self, lease: Lease, run: Run, sink: EventSink, served: _Served) -> None:
        body = served.answer.response()
        await self._finish(lease, run, sink, served, status_of(body), body)

    async def _finish(self, lease: Lease, run: Run, sink: EventSink, served: _Served | None, status: BackgroundStatus, body: bytes) -> None:
        """Store the end of a response. If it was cancelled or deleted first, charge what was used until then."""
        row = response_row(lease.id, run.input, body, run.previous_id)
        belongs = run.conversation_id is not None and status is not BackgroundStatus.FAILED
        pieces = sink.rest()
        event = None if served is None else served.record.own_event()
        ending = Ending(status, row, turn_items(row) if belongs else (), pieces, sink.next_event, sink.is_whole, event)
        if await _persisted(lambda: background.finish(self._db, lease, ending, self._kept_for)):
            self._metrics.response(status)
        else:
            await self._settle(lease, served)

    async def _settle(self, lease: Lease, served: _Served | None) -> None:
        """Charge what a response used until it was cancelled or deleted, like a request whose client went away."""
        event = None
        if served is not None:
            served.record.end(UsageStatus.ABORTED)
            event = served.record.own_event()
        await _persisted(lambda: background.settle(self._db, lease, event))
        self._metrics.response(ABORTED)


async def _persisted(write: Callable[[], Awaitable[T]]) -> T:
    """Write to the database, again and again while it is away."""
    while True:
        try:
            return await write()
        except Unavailable as error:
            log.warning("the state of a response cannot be stored now", extra={"action": "background", "detail": str(error)})
            await asyncio.sleep(AGAIN_S)
