"""Requests with an `Idempotency-Key`: one of them runs, and for a day the others get its answer.

A request without the header pays for one look at its headers and nothing else.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.types import Message, Send

from lmaas.errors import Conflict, InProgress, InvalidRequest, Unavailable
from lmaas.gateway.call import STREAM_HEADERS, Call
from lmaas.observability import GatewayMetrics
from lmaas.store.database import Database
from lmaas.store.idempotency import Answer, Claim, Earlier, give_up, keep, seen, take

log = logging.getLogger(__name__)

MAX_KEY_LENGTH = 255
#: How often Postgres hears that this gateway lives; a third of what makes a claim abandoned.
SEEN_EVERY_S = 10.0
#: How soon it hears of what it could not take at once.
AGAIN_S = 1.0
#: How long Postgres may take to claim a key, and how long the end of an answer waits for Postgres to have it.
CLAIM_S = 5.0
SETTLE_S = 2.0
#: Claims, and settlements, that are with Postgres at a time: the rest of the pool's connections are left to look up keys and models.
AT_ONCE = 3
#: How soon a client may ask again for what is still running.
IN_PROGRESS_RETRY_S = 2.0
#: What is worth keeping: an answer, and what the engine refused as the client's own mistake, which it would refuse again.
KEPT_STATUSES = frozenset({200, 400})
END_OF_STREAM = b"data: [DONE]\n\n"

Settle = Callable[[Answer | None], Awaitable[None]]


class Recorder:
    """Stands on the answer's way to the client and takes a copy. The end goes on only when `settle` has heard what the answer was:
    a client that has the whole of it will get the same again.

    That end is a plain answer's everything, and a stream's `[DONE]`. `settle` gets None for what is not to be kept.
    """

    def __init__(self, send: Send, settle: Settle, max_bytes: int) -> None:
        self._send, self._settle, self._max_bytes = send, settle, max_bytes
        self._status = 0
        self._content_type = ""
        self._length = b""
        self._copy = bytearray()
        self._size = 0
        self._tail = b""
        self._held: list[Message] = []
        self._ended = False

    async def __call__(self, message: Message) -> None:
        """Take one ASGI message of the answer."""
        if self._ended:
            return  # the gateway stopped at the very moment: the client has had its answer
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = dict(message["headers"])
            self._content_type = headers[b"content-type"].decode("latin-1")
            self._length = headers.get(b"content-length", b"")
        else:
            self._take(message.get("body", b""))
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._ended = True
            try:
                await self._settle(self._answer())
            finally:
                for held in [*self._held, message]:
                    await self._send(held)
        elif self._held or not self._streams or self._tail == END_OF_STREAM:
            self._held.append(message)
        else:
            await self._send(message)

    @property
    def _streams(self) -> bool:
        return self._content_type.startswith("text/event-stream")

    def _take(self, body: bytes) -> None:
        self._size += len(body)
        self._tail = (self._tail + body[-len(END_OF_STREAM) :])[-len(END_OF_STREAM) :]
        if self._size <= self._max_bytes:
            self._copy += body
        else:
            self._copy.clear()

    def _answer(self) -> Answer | None:
        whole = self._tail == END_OF_STREAM if self._streams else self._length == str(self._size).encode()
        if not whole or self._status not in KEPT_STATUSES:
            return None
        return Answer(self._status, self._content_type, bytes(self._copy) if self._size <= self._max_bytes else None)


class Idempotency:
    """The claims of one gateway. `run` keeps them alive and must be running while requests are."""

    def __init__(self, db: Database, metrics: GatewayMetrics, max_answer_bytes: int) -> None:
        self._db, self._metrics, self._max_answer_bytes = db, metrics, max_answer_bytes
        #: Claims that are ours, by request id; whoever takes one out settles it.
        self._open: dict[str, Claim] = {}
        #: What Postgres has not heard of yet.
        self._untold: deque[tuple[Claim, Answer | None]] = deque()
        self._settling: set[asyncio.Task[bool]] = set()
        # Ends do not queue behind beginnings: an engine's slot may wait for them.
        self._turns_to_claim, self._turns_to_settle = asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(AT_ONCE)
        # One claim of each tenant at a time stands in line: a flood waits behind itself. Gone with the last who holds or awaits it.
        self._turns_of_tenants: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def wanted(self, call: Call, tenant_id: str, path: str, body: bytes) -> Claim | None:
        """The claim that this request makes; None without the header. Raises InvalidRequest for a key that is none."""
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
    async def claimed(self, call: Call, claim: Claim) -> AsyncIterator[bool]:
        """Whether this request is the one to run, in the block; if not, it has been answered like the one before it.

        Raises InProgress while that one runs, Conflict if it asked for something else or its answer was too large to be kept,
        Unavailable if Postgres is away; then nothing was accepted.
        """
        try:
            of_tenant = self._turns_of_tenants.setdefault(claim.tenant_id, asyncio.Lock())
            async with asyncio.timeout(CLAIM_S), of_tenant, self._turns_to_claim:
                earlier = await take(self._db, claim)
        except BaseException as error:
            # It may be ours, although we did not hear so: then nobody else would be let in for a while.
            self._untold.append((claim, None))
            if not isinstance(error, TimeoutError):
                raise
            raise Unavailable("The database does not respond. Retry after 2 s.", code="database_unavailable", retry_after_s=2) from None
        if earlier is not None:
            await self._replay(call, claim, earlier)
            yield False
            return
        self._open[claim.request_id] = claim

        async def settle(answer: Answer | None) -> None:
            await self._settle(claim, answer)

        call.send_through(lambda send: Recorder(send, settle, self._max_answer_bytes))
        try:
            yield True
        finally:
            await settle(None)

    async def _replay(self, call: Call, claim: Claim, earlier: Earlier) -> None:
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
        """Keep the answer or give the key up, once: the first word counts."""
        if self._open.pop(claim.request_id, None) is None:
            return
        # Goes on although the request's own task is cancelled.
        settling = asyncio.create_task(self._tell(claim, answer), name=f"idempotency-{claim.request_id}")
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)
        await asyncio.shield(settling)

    async def _tell(self, claim: Claim, answer: Answer | None, *, again: bool = False) -> bool:
        """Tell Postgres, or remember to, unless it is remembered already; whether it has heard."""
        extra = {"request_id": claim.request_id, "tenant_id": claim.tenant_id, "action": "settle"}
        try:
            async with asyncio.timeout(SETTLE_S), self._turns_to_settle:
                if answer is None:
                    await give_up(self._db, claim)
                elif not await keep(self._db, claim, answer):
                    log.warning("its idempotency key is somebody else's by now, or its tenant has gone", extra=extra)
        except (Unavailable, TimeoutError) as error:
            # The client gets its answer even so; `run` tells Postgres later.
            log.warning("an idempotency key cannot be settled now", extra=extra | {"detail": repr(error)})
            if not again:
                self._untold.append((claim, answer))
            return False
        return True

    async def run(self) -> None:
        """Tell Postgres that the claims live, and what it could not be told before. Runs until cancelled."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(AGAIN_S)
            # First that we live: after Postgres was away, our claims look abandoned.
            if (self._untold or time.monotonic() - last >= SEEN_EVERY_S) and await self._tell_that_we_live():
                last = time.monotonic()
            await self._tell_rest()

    async def _tell_that_we_live(self) -> bool:
        claims = [*self._open.values(), *(claim for claim, _ in self._untold)]
        try:
            async with asyncio.timeout(CLAIM_S):
                await seen(self._db, claims)
        except (Unavailable, TimeoutError) as error:
            # Soon again: Postgres may take us for dead when it is back.
            log.warning("idempotency keys cannot be renewed now", extra={"action": "renew", "detail": repr(error)})
            return False
        return True

    async def _tell_rest(self) -> None:
        # Taken off only when it is told; a second teller at the same moment does no harm.
        while self._untold and await self._tell(*(item := self._untold[0]), again=True):
            with contextlib.suppress(ValueError):
                self._untold.remove(item)

    async def drained(self) -> None:
        """Wait until no claim is open and Postgres knows of each; for shutdown."""
        while self._open or self._settling or self._untold:
            await self._tell_rest()
            await asyncio.sleep(0.05)
