"""Requests with an `Idempotency-Key`: the first one runs, and repeats get its response for a day.

A request without the header costs only a search of its headers.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from lmaas.errors import Conflict, InProgress, InvalidRequest, Unavailable
from lmaas.inference.sink import STREAM_HEADERS, Sink
from lmaas.observability import GatewayMetrics
from lmaas.store.database import Database
from lmaas.store.idempotency import Answer, Claim, Earlier, give_up, keep, seen, take
from lmaas.web.call import Call

log = logging.getLogger(__name__)

MAX_KEY_LENGTH = 255
#: The interval at which claims are renewed in Postgres. It is a third of the period after which a claim counts as abandoned.
SEEN_EVERY_S = 10.0
#: The delay before a failed settlement is tried again.
AGAIN_S = 1.0
#: The time that Postgres may take to claim a key, and the time for which the end of a response waits until Postgres has stored it.
CLAIM_S = 5.0
SETTLE_S = 2.0
#: The maximum number of claims, and of settlements, in Postgres at a time. The other connections are for looking up keys and models.
AT_ONCE = 3
#: The `retry-after` of a repeat whose first request still runs.
IN_PROGRESS_RETRY_S = 2.0
#: The statuses of responses that are kept: successes, and refusals of the engine, which would refuse the same request again.
KEPT_STATUSES = frozenset({200, 400})

Settle = Callable[[Answer | None], Awaitable[None]]
#: Sends the response for which a kept one stands, given the body of that.
Resume = Callable[[bytes], Awaitable[None]]


class Recorder:
    """A sink that copies an answer on its way to another sink, and holds its end back until `settle` has stored the copy.

    So a client that has received the whole response will receive the same one again. `settle` gets None for an answer that is not kept.
    """

    def __init__(self, sink: Sink, settle: Settle, max_bytes: int) -> None:
        self._sink, self._settle, self._max_bytes = sink, settle, max_bytes
        self._status = 0
        self._content_type = ""
        self._copy = bytearray()
        self._size = 0
        self._finished = False

    @property
    def gone(self) -> asyncio.Event:
        """Set once the receiver has gone."""
        return self._sink.gone

    @property
    def started(self) -> bool:
        """True if the head has been sent."""
        return self._sink.started

    def watch(self) -> None:
        """Begin to notice that the receiver goes."""
        self._sink.watch()

    def on_gone(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` once, when the receiver goes. Returns a function that undoes this."""
        return self._sink.on_gone(callback)

    def add_to_head(self, lines: bytes) -> None:
        """Send these header lines with the head. They are not kept, because they are about this request."""
        self._sink.add_to_head(lines)

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Send status and headers, once."""
        if not self.started:
            self._status, self._content_type = status, headers["content-type"]
        await self._sink.start(status, headers)

    async def write(self, chunk: bytes) -> None:
        """Send and copy a part of the body."""
        self._take(chunk)
        await self._sink.write(chunk)

    async def finish(self, chunk: bytes = b"", *, complete: bool = True) -> None:
        """Send the rest of the body, once the copy is stored."""
        if self._finished:
            return  # the response is complete, and the gateway stops at the same time
        self._finished = True
        self._take(chunk)
        try:
            await self._settle(self._answer() if complete and self._status in KEPT_STATUSES else None)
        finally:
            await self._sink.finish(chunk, complete=complete)

    def _take(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._size <= self._max_bytes:
            self._copy += chunk
        else:
            self._copy.clear()

    def _answer(self) -> Answer:
        return Answer(self._status, self._content_type, bytes(self._copy) if self._size <= self._max_bytes else None)


class Idempotency:
    """The claims of one gateway. `run` keeps them alive and must be running while requests are."""

    def __init__(self, db: Database, metrics: GatewayMetrics, max_answer_bytes: int) -> None:
        self._db, self._metrics, self._max_answer_bytes = db, metrics, max_answer_bytes
        #: Open claims of this gateway by request id. The task that removes one settles it.
        self._open: dict[str, Claim] = {}
        #: Settlements that Postgres has not stored yet.
        self._unsettled: deque[tuple[Claim, Answer | None]] = deque()
        self._settling: set[asyncio.Task[bool]] = set()
        # Settlements have a semaphore of their own, so that they do not wait for claims: an engine's slot may depend on them.
        self._turns_to_claim, self._turns_to_settle = asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(AT_ONCE)
        # Each tenant has one claim at a time in the queue for the semaphore, so that its flood delays only itself. An entry disappears with
        # the last task that holds or awaits the lock.
        self._turns_of_tenants: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def wanted(self, call: Call, tenant_id: str, path: str, body: bytes) -> Claim | None:
        """Return the claim of this request, or None without the header. Raises InvalidRequest for an invalid key."""
        keys = call.idempotency_keys
        if not keys:
            return None
        key = keys[0]
        if len(keys) > 1 or not 0 < len(key) <= MAX_KEY_LENGTH or not (key.isascii() and key.isprintable()):
            raise InvalidRequest(
                f"The Idempotency-Key must be one header with 1 to {MAX_KEY_LENGTH} printable ASCII characters.",
                code="invalid_idempotency_key",
                param="Idempotency-Key",
            )
        return Claim(tenant_id, key, hashlib.sha256(path.encode() + b"\0" + body).digest(), call.request_id)

    @asynccontextmanager
    async def claimed(self, call: Call, claim: Claim, resume: Resume | None = None) -> AsyncIterator[Sink | None]:
        """Yield the sink of the first request, which runs inside the block, or None: a repeat has been answered with the kept response.

        If the kept response stands for a longer one, `resume` sends that to a repeat.

        Raises InProgress while the first request runs, Conflict if its body was different or its response was too large to be kept, and
        Unavailable if Postgres is away. After an error nothing is accepted.
        """
        try:
            of_tenant = self._turns_of_tenants.setdefault(claim.tenant_id, asyncio.Lock())
            async with asyncio.timeout(CLAIM_S), of_tenant, self._turns_to_claim:
                earlier = await take(self._db, claim)
        except BaseException as error:
            # Postgres may have stored the claim although no reply arrived. Giving it up later lets a repeat in.
            self._unsettled.append((claim, None))
            if not isinstance(error, TimeoutError):
                raise
            raise Unavailable("The database does not respond. Retry after 2 s.", code="database_unavailable", retry_after_s=2) from None
        if earlier is not None:
            await self._replay(call, claim, earlier, resume)
            yield None
            return
        self._open[claim.request_id] = claim

        async def settle(answer: Answer | None) -> None:
            await self._settle(claim, answer)

        try:
            yield Recorder(call, settle, self._max_answer_bytes)
        finally:
            await settle(None)

    def kept(self, claim: Claim) -> None:
        """Note that the response of a claim has been kept already, in the transaction of what it reports."""
        self._open.pop(claim.request_id, None)

    async def _replay(self, call: Call, claim: Claim, earlier: Earlier, resume: Resume | None) -> None:
        if not earlier.same:
            raise Conflict("This Idempotency-Key was used for a different request. Use a new key.", code="idempotency_mismatch")
        answer = earlier.answer
        if answer is None:
            raise InProgress(
                f"The request with this Idempotency-Key is still running. Retry after {IN_PROGRESS_RETRY_S:.0f} s.",
                retry_after_s=IN_PROGRESS_RETRY_S,
            )
        if answer.body is None:
            raise Conflict(
                "The response to the request with this Idempotency-Key was too large to be kept. Use a new key to run the request again.",
                code="idempotency_answer_too_large",
            )
        detail = f"the answer of {earlier.request_id}"
        log.info("replayed", extra={"request_id": call.request_id, "tenant_id": claim.tenant_id, "action": "replay", "detail": detail})
        self._metrics.replays.inc()
        if resume is not None:
            call.add_to_head(b"idempotency-replayed: true\r\n")
            await resume(answer.body)
            return
        headers = {"content-type": answer.content_type, "idempotency-replayed": "true"}
        if answer.content_type.startswith("text/event-stream"):
            headers |= STREAM_HEADERS
        else:
            headers["content-length"] = str(len(answer.body))
        if answer.status >= 400:
            headers["x-should-retry"] = "false"
        await call.start(answer.status, headers)
        await call.finish(answer.body)

    async def _settle(self, claim: Claim, answer: Answer | None) -> None:
        """Keep the response or give up the key. Only the first call for a claim has an effect."""
        if self._open.pop(claim.request_id, None) is None:
            return
        # A task of its own, which continues if the request's task is cancelled.
        settling = asyncio.create_task(self._store(claim, answer), name=f"idempotency-{claim.request_id}")
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)
        await asyncio.shield(settling)

    async def _store(self, claim: Claim, answer: Answer | None, *, again: bool = False) -> bool:
        """Store the settlement in Postgres and return whether that worked. If not, remember it, unless this is a repeated attempt."""
        extra = {"request_id": claim.request_id, "tenant_id": claim.tenant_id, "action": "settle"}
        try:
            async with asyncio.timeout(SETTLE_S), self._turns_to_settle:
                if answer is None:
                    await give_up(self._db, claim)
                elif not await keep(self._db, claim, answer):
                    log.warning("the idempotency key belongs to another request by now, or its tenant was deleted", extra=extra)
        except (Unavailable, TimeoutError) as error:
            # The client gets its response anyway. `run` tries again later.
            log.warning("an idempotency key cannot be settled now", extra=extra | {"detail": repr(error)})
            if not again:
                self._unsettled.append((claim, answer))
            return False
        return True

    async def run(self) -> None:
        """Renew the claims in Postgres, and repeat settlements that failed. Runs until cancelled."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(AGAIN_S)
            # Renew first: after an outage of Postgres, open claims look abandoned.
            if (self._unsettled or time.monotonic() - last >= SEEN_EVERY_S) and await self._renew():
                last = time.monotonic()
            await self._settle_rest()

    async def _renew(self) -> bool:
        claims = [*self._open.values(), *(claim for claim, _ in self._unsettled)]
        try:
            async with asyncio.timeout(CLAIM_S):
                await seen(self._db, claims)
        except (Unavailable, TimeoutError) as error:
            # Tried again soon, because the claims may look abandoned when Postgres is back.
            log.warning("idempotency keys cannot be renewed now", extra={"action": "renew", "detail": repr(error)})
            return False
        return True

    async def _settle_rest(self) -> None:
        # An item is removed only after it was stored. Storing one twice at the same time does no harm.
        while self._unsettled and await self._store(*(item := self._unsettled[0]), again=True):
            with contextlib.suppress(ValueError):
                self._unsettled.remove(item)

    async def drained(self) -> None:
        """Wait until no claim is open and every settlement is stored. For shutdown."""
        while self._open or self._settling or self._unsettled:
            await self._settle_rest()
            await asyncio.sleep(0.05)
