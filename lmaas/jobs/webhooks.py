"""Sends events to webhooks: leases deliveries that are due, sends each once, and stores what came of it."""

import asyncio
import functools
import logging
import random
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TypeVar

from lmaas.errors import Unavailable
from lmaas.jobs.attempts import ended
from lmaas.jobs.metrics import JobMetrics
from lmaas.store import deliveries
from lmaas.store.database import Database
from lmaas.store.deliveries import DeliveryLease, Outcome
from lmaas.webhooks.retries import retry_in_s
from lmaas.webhooks.sending import Sender, Sent

log = logging.getLogger(__name__)

#: The interval at which a runner looks for deliveries that are due.
LOOK_S = 1.0
#: The deliveries that one runner sends at a time.
MAX_AT_ONCE = 128
#: The time for which a runner that stops waits for attempts: longer than one takes.
GRACE_S = 20.0
#: The pause before something is stored again that Postgres did not take.
AGAIN_S = 1.0
#: The approximate number of attempts after which a webhook's ended deliveries are trimmed. The last attempt determines the webhook.
TRIM_EVERY = 100
#: The status with which a target ends its subscription.
GONE = 410

T = TypeVar("T")


class WebhookWorker:
    """The deliveries that one job runner sends."""

    def __init__(
        self,
        db: Database,
        sender: Sender,
        metrics: JobMetrics,
        off_after: timedelta,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._db, self._sender, self._metrics, self._off_after, self._chance = db, sender, metrics, off_after, chance
        self._running: dict[DeliveryLease, asyncio.Task[None]] = {}
        self._in_doubt = False
        self._attempts = 0

    async def run(self, runner_id: str, stopping: asyncio.Event) -> None:
        """Send what is due until `stopping` is set, and finish what is being sent then. Raises LeaseLost."""
        self._running, self._in_doubt = {}, False
        async with self._sender, asyncio.TaskGroup() as group:
            stopped = group.create_task(_wait(stopping), name="stopping")
            while not stopping.is_set():
                found = await self._claim(runner_id)
                for lease in found:
                    task = group.create_task(self._attempt(lease), name=f"delivery-{lease.event_id}")
                    self._running[lease] = task
                    task.add_done_callback(functools.partial(self._ended, lease))
                waits_for = {stopped, *self._running.values()} if found else {stopped}
                await asyncio.wait(waits_for, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            # While Postgres is away, what was sent cannot be recorded. Then another runner sends it again.
            await ended(set(self._running.values()), GRACE_S)

    def _ended(self, lease: DeliveryLease, _: "asyncio.Task[None]") -> None:
        self._running.pop(lease, None)

    async def _claim(self, runner_id: str) -> list[DeliveryLease]:
        room = MAX_AT_ONCE - len(self._running)
        if room <= 0:
            return []
        try:
            if self._in_doubt:
                await deliveries.give_back_others(self._db, runner_id, self._running.keys())
            self._in_doubt = True
            found = await deliveries.claim(self._db, runner_id, room)
        except Unavailable as error:
            log.warning("deliveries to webhooks cannot be leased now", extra={"action": "lease", "detail": str(error)})
            return []
        self._in_doubt = False
        return found

    async def _attempt(self, lease: DeliveryLease) -> None:
        """Send an event once, and store what came of it."""
        extra = {"tenant_id": lease.tenant_id, "action": "webhook", "detail": f"{lease.webhook_id} {lease.event_id}"}
        message = await _persisted(lambda: deliveries.begin(self._db, lease))
        if message is None:
            return
        try:
            sent = await self._sender.send(message.url, lease.event_id, message.body, message.keys)
        except Exception:
            # Other deliveries must not suffer. The log has the details, and the attempt counts as failed.
            log.exception("unexpected error", extra=extra)
            sent = Sent(None, "The service failed to send this event.", 0)
        outcome = self._outcome(sent, message.failures)
        switched_off = await _persisted(lambda: deliveries.finish(self._db, lease, outcome, self._off_after))
        if switched_off:
            log.warning("a webhook that keeps failing is switched off", extra=extra)
            self._metrics.webhook("switched_off")
        self._metrics.webhook("delivered" if outcome.error is None else "failed" if outcome.retry_in_s is None else "retried")
        self._attempts += 1
        if self._attempts % TRIM_EVERY == 0:
            await _persisted(lambda: deliveries.trim(self._db, lease.tenant_id, lease.webhook_id))

    def _outcome(self, sent: Sent, failures: int) -> Outcome:
        if sent.error is None:
            return Outcome(sent.duration_ms, sent.status_code)
        is_gone = sent.status_code == GONE
        pause_s = None if is_gone else retry_in_s(failures, sent.retry_after_s, self._chance())
        return Outcome(sent.duration_ms, sent.status_code, sent.error, pause_s, is_gone)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


async def _persisted(write: Callable[[], Awaitable[T]]) -> T:
    """Write to the database, again and again while it is away."""
    while True:
        try:
            return await write()
        except Unavailable as error:
            log.warning("the state of a delivery cannot be stored now", extra={"action": "webhook", "detail": str(error)})
            await asyncio.sleep(AGAIN_S)
