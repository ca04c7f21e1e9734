"""Validates and finalizes batches."""

import asyncio
import logging
import time
from typing import Protocol

from lmaas.errors import LmaasError, Unavailable
from lmaas.jobs.metrics import JobMetrics
from lmaas.states import BatchStatus
from lmaas.store.database import Database
from lmaas.store.line_leases import claim_batch, give_back_batch, give_back_other_batches, settle, unsettled
from lmaas.store.runners import BatchLease, LeaseLost

log = logging.getLogger(__name__)

#: The batches that a runner works on at a time.
AT_ONCE = 2
#: The interval at which the runner looks for new work.
LOOK_S = 1.0
#: The pause after a failure. It doubles with each in a row, up to the maximum.
PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
#: A batch whose validation fails so often on one runner for an unexpected reason, or with which so many runners were lost, has failed.
MAX_ATTEMPTS = 5
#: The most batches whose failures are remembered.
MAX_LATER = 1_000


class BatchSteps(Protocol):
    """The steps of a whole batch. Each step may be repeated. It raises LeaseLost if another runner may have the batch."""

    async def validate(self, lease: BatchLease) -> None:
        """Read the input file, and store its lines or what is wrong with it."""

    async def finalize(self, lease: BatchLease) -> None:
        """Write the output files, and end the batch."""

    async def fail(self, lease: BatchLease, code: str, message: str) -> None:
        """End a batch that could not be validated."""


class BatchWorker:
    """Leases batches that are to be validated or finalized, and makes those ready that stop early."""

    def __init__(self, db: Database, steps: BatchSteps, metrics: JobMetrics) -> None:
        self._db, self._steps, self._metrics = db, steps, metrics
        #: Batches whose last step failed: how often, and when it is tried again.
        self._later: dict[tuple[str, str], tuple[int, float]] = {}
        #: The batches that are worked on, and whether others may be leased, because Postgres did not reply.
        self._leased: set[BatchLease] = set()
        self._in_doubt = False
        #: The number of times that the step of a batch failed for an unexpected reason.
        self._failures: dict[tuple[str, str], int] = {}

    async def run(self, runner_id: str, stopping: asyncio.Event) -> None:
        """Work until `stopping` is set. Steps that run then are broken off, because another runner repeats them."""
        self._leased, self._in_doubt = set(), False
        async with asyncio.TaskGroup() as group:
            settling = group.create_task(self._settle_forever(), name="settle-batches")
            running: set[asyncio.Task[None]] = set()
            stopped = group.create_task(_wait(stopping), name="stopping")
            while not stopping.is_set():
                claimed = await self._claim(runner_id) if len(running) < AT_ONCE else None
                if claimed is not None:
                    lease, status = claimed
                    step = group.create_task(self._step(lease, status), name=f"batch-{lease.batch_id}")
                    running.add(step)
                    step.add_done_callback(running.discard)
                    continue
                await asyncio.wait({stopped, *running}, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            settling.cancel()
            for step in running:
                step.cancel()

    async def _claim(self, runner_id: str) -> tuple[BatchLease, str] | None:
        now = time.monotonic()
        later = [batch for batch, (_, at) in self._later.items() if at > now]
        try:
            if self._in_doubt:
                await give_back_other_batches(self._db, runner_id, {(lease.tenant_id, lease.batch_id) for lease in self._leased})
            self._in_doubt = True
            claimed = await claim_batch(self._db, runner_id, later)
        except Unavailable as error:
            log.warning("batches cannot be leased now", extra={"action": "lease", "detail": str(error)})
            return None
        self._in_doubt = False
        if claimed is not None:
            self._leased.add(claimed[0])
        return claimed

    async def _step(self, lease: BatchLease, status: str) -> None:
        batch = lease.tenant_id, lease.batch_id
        step = "validate" if status == BatchStatus.VALIDATING else "finalize"
        extra = {"tenant_id": lease.tenant_id, "action": step, "detail": lease.batch_id}
        if step == "validate" and lease.losses >= MAX_ATTEMPTS:
            log.error("a batch is not validated again, because several runners were lost meanwhile", extra=extra)
            self._metrics.step(step, "failed")
            await self._give_back(lease, give_up=True)
            self._leased.discard(lease)
            return
        try:
            await (self._steps.validate if step == "validate" else self._steps.finalize)(lease)
        except LeaseLost:
            # The batch was cancelled or deleted meanwhile, or this runner was lost, which its heartbeat reports.
            outcome = "superseded"
        except LmaasError as error:
            outcome = "postponed"
            log.warning("a batch cannot be worked on now", extra=extra | {"code": error.error_code})
        except Exception:
            # Another batch must not suffer. The log has the details.
            outcome = "failed"
            log.exception("unexpected error", extra=extra)
        else:
            outcome = "done"
        self._metrics.step(step, outcome)
        if outcome == "done":
            self._later.pop(batch, None)
        else:
            self._postpone(batch)
        # Tries that were postponed because a service was away do not count.
        failures = self._failures[batch] = self._failures.pop(batch, 0) + (outcome == "failed")
        if outcome == "done" or not failures:
            del self._failures[batch]
        while len(self._failures) > MAX_LATER:
            del self._failures[next(iter(self._failures))]
        await self._give_back(lease, give_up=outcome == "failed" and step == "validate" and failures >= MAX_ATTEMPTS)
        self._leased.discard(lease)

    def _postpone(self, batch: tuple[str, str]) -> None:
        failures = self._later.pop(batch, (0, 0.0))[0] + 1
        self._later[batch] = failures, time.monotonic() + min(MAX_PAUSE_S, PAUSE_S * 2 ** (failures - 1))
        while len(self._later) > MAX_LATER:
            del self._later[next(iter(self._later))]

    async def _give_back(self, lease: BatchLease, *, give_up: bool) -> None:
        while True:
            try:
                if give_up:
                    message = "The service failed to validate this batch. Report its id."
                    await self._steps.fail(lease, "internal_error", message)
                return await give_back_batch(self._db, lease)
            except LeaseLost:
                return None
            except Unavailable:
                await asyncio.sleep(PAUSE_S)

    async def _settle_forever(self) -> None:
        while True:
            try:
                for tenant_id, batch_id in await unsettled(self._db):
                    await settle(self._db, tenant_id, batch_id)
            except Unavailable as error:
                log.warning("batches cannot be settled now", extra={"action": "settle", "detail": str(error)})
            await asyncio.sleep(LOOK_S)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
