"""Runs one leased line to its end: each attempt goes the way of a request, and has an id and a usage event of its own."""

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lmaas.batches.lines import request_body
from lmaas.errors import InternalError, LmaasError, Unavailable
from lmaas.http import new_request_id
from lmaas.inference.observers import Observers
from lmaas.inference.protocol import AnyInference, AnyProtocol, Inference
from lmaas.inference.serving import Inferences
from lmaas.inference.sink import Collected
from lmaas.inference.work import BATCH, PutBack
from lmaas.jobs.budgets import Budgets
from lmaas.jobs.commits import Commits
from lmaas.jobs.endings import Next
from lmaas.jobs.held import HeldLine, HeldLines
from lmaas.jobs.keys import Keys
from lmaas.jobs.metrics import JobMetrics
from lmaas.jobs.runner import until_set
from lmaas.protocols.responses.lines import LineResponses
from lmaas.states import LineState, UsageStatus
from lmaas.store.batch_lines import EndedLine
from lmaas.store.database import Database
from lmaas.store.line_leases import stop_batch
from lmaas.types import Principal

log = logging.getLogger(__name__)

#: A line that so many runners were lost with is not run again.
MAX_LOST = 5
KEY_GONE = "invalid_api_key"
LOST = b'{"code":"runner_lost","message":"Several job runners ended while they processed this line, so it is not tried again."}'


@dataclass(frozen=True, slots=True)
class Attempts:
    """Runs the lines of one runner."""

    db: Database
    inferences: Inferences
    protocols: Mapping[str, AnyProtocol]
    keys: Keys
    held: HeldLines
    commits: Commits
    budgets: Budgets
    metrics: JobMetrics
    observers: Observers

    async def run(self, line: HeldLine) -> None:
        """Try a line until it has ended or is to be given back. Cancelling this leaves it leased."""
        try:
            if line.lease.losses >= MAX_LOST:
                self._end(line, LineState.FAILED, None, LOST)
                return
            await self.commits.room_for(line.leaving)
            while not line.leaving.is_set():
                again = await self._attempt(line)
                if not again:
                    return
                self.metrics.line("retried")
                line.inference = line.sink = None
                await until_set(line.leaving, line.tries.pause_s)
            self.give_back(line)
        except Exception:
            # Other lines must not suffer. The log has the details.
            log.exception("unexpected error", extra={"tenant_id": line.lease.tenant_id, "action": "line", "detail": line.lease.batch_id})
            self._fail(line, InternalError(), new_request_id())
        finally:
            line.inference = line.sink = None
            self.held.forget_text(line)

    async def _attempt(self, line: HeldLine) -> bool:
        """Try a line once. Returns whether it is to be tried again."""
        tenant_id, offer = line.lease.tenant_id, line.offer
        request_id, protocol = new_request_id(), self.protocols[offer.endpoint]
        sink = line.sink = Collected()
        self.metrics.line("attempted")
        principal = None
        try:
            principal = await self.keys(tenant_id, offer.key_id)
            if principal is None:
                message = "The API key that created this batch was revoked or has expired. Create the batch again with a valid key."
                await self._stop(line, KEY_GONE, message)
                return False
            request = protocol.read(request_body(offer.endpoint, line.text, protocol.texts))
            work = replace(BATCH, deadline_s=max(1.0, offer.left_s))
            inference = line.inference = Inference(request_id, protocol, request, work)
            self.observers.attempt_began(inference)
            await self.inferences.serve(principal, inference, sink)
        except PutBack:
            self._note_end(line, principal)
            self.metrics.line("put_back")
            self.held.note_put_back(line)
            self.give_back(line)
            return False
        except LmaasError as error:
            self._note_end(line, principal, error.error_code)
            return await self._refused(line, principal, error, request_id)
        self._note_end(line, principal)
        if not sink.finished:
            self.give_back(line)  # the batch worker is leaving
            return False
        if inference.record.run_ms is not None:
            self.held.note_begun(line)
        following = line.tries.ended(sink.status, inference.record.code, retryable=sink.headers.get("x-should-retry") == "true")
        if following is Next.AGAIN:
            return True
        state = LineState.DONE if following is Next.DONE else LineState.FAILED
        self._end(line, state, sink.status, sink.body, request_id, inference)
        return False

    def _note_end(self, line: HeldLine, principal: Principal | None, code: str | None = None) -> None:
        if principal is not None and line.inference is not None:
            self.observers.attempt_ended("batch_line", principal, line.inference, line.lease.batch_id, code)

    async def _refused(self, line: HeldLine, principal: Principal | None, error: LmaasError, request_id: str) -> bool:
        following = line.tries.refused(error, others_run=self.held.others_run(line))
        if following is Next.AGAIN:
            return True
        if following is Next.STOP:
            try:
                if principal is not None and line.inference is not None and not await self.budgets.is_spent(principal, line.inference):
                    line.tries.unspent()
                    return True
                await self._stop(line, error.error_code, error.message)
            except Unavailable:
                return True
        else:
            self._fail(line, error, request_id)
        return False

    async def _stop(self, line: HeldLine, code: str, message: str) -> None:
        """Run no more lines of the batch. Raises Unavailable."""
        await stop_batch(self.db, *line.batch, code, message)
        self.give_back(line)
        self.held.leave_waiting(line.batch)

    def _fail(self, line: HeldLine, error: LmaasError, request_id: str) -> None:
        protocol = self.protocols[line.offer.endpoint]
        text = json.dumps(protocol.error_body(error, request_id), ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
        self._end(line, LineState.FAILED, protocol.error_status(error), text, request_id)

    def _end(
        self,
        line: HeldLine,
        state: LineState,
        status: int | None,
        answer: bytes,
        request_id: str | None = None,
        inference: AnyInference | None = None,
    ) -> None:
        """Have the end of a line stored, with the usage event and the response of its last attempt if an engine was called."""
        lease, line.ended = line.lease, True
        event = None if inference is None else inference.record.own_event()
        turn = None
        if inference is not None and inference.record.status is UsageStatus.COMPLETED and isinstance(inference.protocol, LineResponses):
            turn = inference.protocol.turn(inference)
        self.metrics.line(state)
        self.commits.end(
            EndedLine(lease.tenant_id, lease.batch_id, lease.position, lease.attempt, state, request_id, status, answer, event, turn)
        )

    def give_back(self, line: HeldLine) -> None:
        """Have a line given back."""
        line.ended = True
        self.commits.give_back(line.lease)


async def ended(tasks: "set[asyncio.Task[None]]", grace_s: float) -> None:
    """Wait for tasks, and cancel those that have not ended after `grace_s` seconds."""
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=grace_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)
