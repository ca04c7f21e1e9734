"""The one Python client of the scheduler's function library."""

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeout

from lmaas.errors import Unavailable
from lmaas.scheduling.pipelining import PipelinedConnection
from lmaas.scheduling.states import RetryReason
from lmaas.states import Observed
from lmaas.types import TokenCounts

log = logging.getLogger(__name__)

#: The parts of the function library, in the order in which they are joined.
PARTS = ("state", "limits", "fairness", "placement", "scheduler")
#: Where the scheduler asks for replicas.
CONTROL_CHANNEL = "lmaas:control"
_ENCODE = msgspec.json.Encoder().encode
_DECODE = msgspec.json.Decoder(dict[str, Any]).decode


class LimitedScope(msgspec.Struct, frozen=True, omit_defaults=True):
    """A tenant or a key (`scope` says which), and the limits that hold for it. None is no limit, and is not sent; the budget is in
    micro-dollars."""

    id: str
    scope: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    tokens_per_month: int | None = None
    budget_per_month: int | None = None


class Ticket(msgspec.Struct, frozen=True):
    """A queued request, as the scheduler sees it: never its prompt. One is made and sent with every request, so it is a msgspec.Struct.

    `adapter` is the engine's name of the adapter (empty for the base model), `source` where its files are in the object store,
    `weight` how many sequences it needs, `event` the usage event (JSON) to write if its gateway dies. `share` divides what its tenant
    is charged in the fair queue, and `head_start` is how many earlier tickets of its tenant it may go before (after, if negative).
    Tokens are estimates: of the prompt, and the most that the completion may have. `prices` are for prompt, cached and completion
    tokens, in micro-dollars per million tokens.
    """

    id: str
    pool: str
    tenant: str
    gateway: str
    adapter: str
    source: str
    weight: int
    event: str
    share: float = 1.0
    head_start: int = 0
    prompt_tokens: int = 1
    completion_tokens: int = 0
    prices: tuple[int, int, int] = (0, 0, 0)
    limits: tuple[LimitedScope, ...] = ()

    def sent(self, waited_ms: int, attempts: int, more: bytes = b"") -> bytes:
        """Its JSON with how long it has waited and how often it was delivered; `more` is further fields."""
        return b'%b,"waited_ms":%d,"attempts":%d%b}' % (_ENCODE(self)[:-1], waited_ms, attempts, more)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many tickets may wait: of one tenant, and in the whole pool."""

    max_queued: int
    max_queued_pool: int


@dataclass(frozen=True, slots=True)
class Seed:
    """What a scope has used in a month (year x 100 + month, UTC) by the ledger: tokens, and picodollars."""

    month: int
    tokens: int
    cost_picousd: int


@dataclass(frozen=True, slots=True)
class Beat:
    """What a supervisor tells about its replica. `resident` are the adapters on its engine."""

    url: str
    slots: int
    adapter_slots: int
    state: Observed
    resident: list[str]
    #: The engine has just been seen to work.
    cleared: bool = False
    #: The engine seems to stand still.
    suspect: bool = False
    #: What a start in this pool usually takes.
    start_ms: int | None = None
    #: What is left of this replica's own start, and by how much it is late.
    left_ms: int | None = None
    late_ms: int | None = None


def connect(url: str) -> Redis:
    """A client that waits 5 s for an answer and tries a lost connection again twice."""
    retry = Retry(ExponentialBackoff(cap=0.5, base=0.05), 2)
    return Redis.from_url(url, decode_responses=True, socket_timeout=5, socket_connect_timeout=5, retry=retry, health_check_interval=15)


def gateway_channel(gateway: str) -> str:
    """Where a gateway hears of its tickets."""
    return f"lmaas:gateway:{gateway}"


def replica_channel(replica: str) -> str:
    """Where a supervisor hears that there is something to load or to look at."""
    return f"lmaas:replica:{replica}"


def library() -> str:
    """The function library's text."""
    return "\n".join(Path(__file__).with_name(f"{part}.lua").read_text() for part in PARTS)


class Scheduler:
    """Calls the function library, and loads it where it is missing (a fresh server, or one that has lost its memory).

    The library's and the functions' names carry a hash of its text, since servers keep functions across restarts: a new version never
    runs as an old one, and while a service is upgraded both are there. Every call is atomic and touches one pool. A server that is
    away, or takes nothing (out of memory, read only), raises Unavailable.
    """

    def __init__(self, redis: Redis, text: str | None = None) -> None:
        self._pipelined = PipelinedConnection(redis)
        self.redis = redis
        text = text or library()
        self._prefix = f"lmaas_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        self._library = text.replace("name=lmaas", f"name={self._prefix}", 1).replace("'lmaas_", f"'{self._prefix}_")
        #: How far each pool's memory was when we saw it last: the server's process, and a mark that grows with every call.
        self._memories: dict[str, str] = {}

    async def call(self, function: str, pool: str, *args: bytes | str | int) -> Any:
        """Call a function of the library for one pool. Raises Unavailable."""
        name, key = f"{self._prefix}_{function}", f"lmaas:{{{pool}}}"
        try:
            try:
                return await self._pipelined.send("FCALL", name, 1, key, *args)
            except ResponseError as error:
                if "Function not found" not in str(error):
                    raise
                await self.load()
                return await self._pipelined.send("FCALL", name, 1, key, *args)
        except RedisError as error:
            raise _away(function, error) from error

    async def _call_as_seen(self, function: str, pool: str, *args: bytes | str | int, at: int = 0) -> dict[str, Any]:
        """A call that tells, as argument `at`, how far we have seen this pool: a server that is behind has come back with an older memory
        (a snapshot, a replica that lagged), and begins the pool anew."""
        told = self._memories.get(pool, "")
        reply = _DECODE(await self.call(function, pool, *args[:at], told, *args[at:]))
        self.saw(pool, reply.pop("memory"), told)
        return reply

    def saw(self, pool: str, memory: str, told: str | None = None) -> None:
        """Remember the pool's memory. What we know of an earlier process stays until the server has been told."""
        known = self._memories.get(pool, "")
        process = memory[: memory.index(" ") + 1]
        if known.startswith(process) or known in ("", told):
            self._memories[pool] = memory

    async def load(self) -> None:
        """Install this version of the library."""
        with unswallowed():
            await self.redis.function_load(self._library, replace=True)

    async def submit(
        self, ticket: Ticket, bounds: Bounds, *, waited_ms: int = 0, attempts: int = 0, seeds: Mapping[str, Seed] | None = None
    ) -> dict[str, Any]:
        """Queue a ticket and reserve what it may use: the answer is a grant if there is a free slot.

        It was not taken if `state` is one of REFUSALS. After UNSEEDED, submit it again with `seeds` for the `scopes` of the answer, as of
        its `month`.
        """
        told = {scope: (seed.month, seed.tokens, seed.cost_picousd) for scope, seed in seeds.items()} if seeds else None
        sent = ticket.sent(waited_ms, attempts)
        reply = _DECODE(
            await self.call("submit", ticket.pool, sent, bounds.max_queued, bounds.max_queued_pool, "" if told is None else _ENCODE(told))
        )
        if memory := reply.pop("memory", ""):
            self.saw(ticket.pool, memory)
        return reply

    async def release(self, ticket: Ticket, event: str, run_ms: int | None, used: TokenCounts | None = None) -> bool:
        """End a ticket, settle it to what it `used` (None: nothing) and record its usage event, in one step.

        False if the scheduler no longer knew it.
        """
        ran = "" if run_ms is None else run_ms
        return self.released(ticket, await self.call("release", ticket.pool, ticket.id, event, ran, _counts(used)))

    def send_release(self, ticket: Ticket, event: str, run_ms: int | None, used: TokenCounts | None) -> "asyncio.Future[Any]":
        """The same, tried once and not waited for: the future gets a reply for `released`, or a RedisError."""
        name, key = f"{self._prefix}_release", f"lmaas:{{{ticket.pool}}}"
        return self._pipelined.send("FCALL", name, 1, key, ticket.id, event, "" if run_ms is None else run_ms, _counts(used))

    def released(self, ticket: Ticket, reply: Any) -> bool:
        """What the reply to a release says: False if the scheduler no longer knew the ticket."""
        known, memory = reply
        if memory:
            self.saw(ticket.pool, memory)
        return bool(known)

    async def retry(self, ticket: Ticket, replica: str, reason: RetryReason, attempt: int) -> dict[str, Any]:
        """Put a granted ticket back, once. `attempt` is the delivery that failed, from 0."""
        return _DECODE(await self.call("retry", ticket.pool, ticket.id, replica, reason, attempt))

    async def renew(self, pool: str, progress: Sequence[tuple[str, TokenCounts | None]]) -> dict[str, Any]:
        """Keep tickets alive and return how they are. `progress` is pairs of ticket id and the tokens so far; None before the first."""
        return await self._call_as_seen("renew", pool, *(part for name, counts in progress for part in (name, _counts(counts))))

    async def restore(self, ticket: Ticket, replica: str, *, waited_ms: int, attempts: int) -> bool:
        """Put back a running ticket that the scheduler has forgotten. False while its replica is not back."""
        sent = ticket.sent(waited_ms, attempts, b',"replica":' + _ENCODE(replica))
        return bool(await self.call("restore", ticket.pool, sent))

    async def heartbeat(self, pool: str, replica: str, beat: Beat) -> dict[str, Any]:
        """Say that a replica lives; hear what it should load."""
        fields = {name: value for name, value in asdict(beat).items() if value is not None}
        return await self._call_as_seen("heartbeat", pool, replica, _ENCODE(fields), at=2)

    async def loaded(self, pool: str, replica: str, adapter: str) -> int:
        """The adapter is resident now: grants what waited for it."""
        return int(await self.call("loaded", pool, replica, adapter))

    async def load_failed(self, pool: str, replica: str, adapter: str, reason: str) -> int:
        """The adapter cannot be loaded: fails what waited for it."""
        return int(await self.call("load_failed", pool, replica, adapter, reason))

    async def evict(self, pool: str, replica: str, adapter: str) -> bool:
        """Whether the adapter may be unloaded now; if so, nothing more is granted with it there."""
        return bool(await self.call("evict", pool, replica, adapter))

    async def drain(self, pool: str, replica: str) -> int:
        """No more grants on this replica. Answers the slots in use, -1 if the replica is unknown (until its next heartbeat)."""
        return int(await self.call("drain", pool, replica))

    async def deregister(self, pool: str, replica: str) -> None:
        """The replica's engine is gone."""
        await self.call("deregister", pool, replica)

    async def stats(self, pool: str, delay_ms: int = 0) -> dict[str, Any]:
        """Return demand and replicas of a pool, for the controller, whose presence it tells; also reap what has expired.

        `delay_ms` is by how much longer than usual a start takes at present.
        """
        return await self._call_as_seen("stats", pool, delay_ms)

    async def record_event(self, pool: str, event: str) -> None:
        """Hand a usage event to the metering writer."""
        try:
            with unswallowed():
                await self.redis.xadd(f"lmaas:{{{pool}}}:usage", {"event": event})
        except RedisError as error:
            raise _away("record_event", error) from error

    async def listen(self, channel: str) -> AsyncIterator[str]:
        """Messages on a channel, for ever: '' at every (re)connection, since what was said before it may have been missed."""
        while True:
            try:
                async with self.redis.pubsub() as subscription:
                    with unswallowed():
                        await subscription.subscribe(channel)
                    while True:
                        with unswallowed():
                            message = await subscription.get_message(timeout=5)
                        # The client library connects and subscribes again by itself; only this word tells of it.
                        if message is not None and message["type"] == "subscribe":
                            yield ""
                        elif message is not None and message["type"] == "message":
                            yield message["data"]
            except RedisError as error:
                log.warning("subscription to %s was lost", channel, extra={"action": "subscribe", "detail": str(error)})
                await asyncio.sleep(0.5)


@contextlib.contextmanager
def unswallowed() -> Iterator[None]:
    """Cancelled in this block means cancelled after it: redis-py sends with asyncio.wait_for, which on Python 3.11 can swallow that."""
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        yield
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


def _counts(tokens: TokenCounts | None) -> bytes:
    """Encode token counts for the functions, which decode them with `tokens_of` (state.lua)."""
    return b"" if tokens is None else _ENCODE(tokens)


def _away(function: str, error: RedisError) -> Unavailable:
    if not isinstance(error, RedisConnectionError | RedisTimeout):
        # It is there, but it refuses: somebody should know why.
        log.error("the queue refused", extra={"action": function, "detail": str(error)})
    return Unavailable("The request queue is not available. Retry after 2 s.", code="queue_unavailable", retry_after_s=2)
