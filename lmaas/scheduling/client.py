"""The one Python client of the scheduler's function library."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
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

from lmaas.cancellation import unswallowed
from lmaas.errors import SettingsError, Unavailable
from lmaas.scheduling.pipelining import PipelinedConnection
from lmaas.scheduling.states import RetryReason
from lmaas.states import Observed
from lmaas.types import TokenCounts

log = logging.getLogger(__name__)

#: The parts of the function library, in the order in which they are joined.
PARTS = (
    "layout",
    "state",
    "limits",
    "fairness",
    "reserve",
    "fleet",
    "placement",
    "yielding",
    "dispatch",
    "endings",
    "outlook",
    "scheduler",
)
#: The channel on which the scheduler requests replicas.
CONTROL_CHANNEL = "lmaas:control"
#: The duration of a start if none of the pool is known and the controller reports no other estimate (START_MS in layout.lua).
FIRST_START_MS = 20_000
_ENCODE = msgspec.json.Encoder().encode
_PACK = msgspec.msgpack.Encoder().encode
#: The numbers in the second line of a stored replica.
_NUMBERS = ("load", "back", "latest", "runs", "has", "slots", "adapter_slots", "life", "since")
#: White space at the end of texts, by which Lua distinguishes them quickly (`tail_of` in layout.lua).
_TAILS = tuple(" " * (number // 4) + " \t\n\r"[number % 4] for number in range(64))
_DECODE = msgspec.json.Decoder(dict[str, Any]).decode


class LimitedScope(msgspec.Struct, frozen=True, array_like=True):
    """A tenant or a key (`scope` is `tenant` or `key`) and its limits. None means no limit. The budget is in
    micro-dollars."""

    id: str
    scope: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    tokens_per_month: int | None = None
    budget_per_month: int | None = None


class Ticket(msgspec.Struct, frozen=True):
    """A queued request as the scheduler sees it, without its prompt. One is made and sent with every request, so it is a msgspec.Struct.

    `adapter` is the engine's name of the adapter (empty for the base model), `source` the place of its files in the object store,
    `weight` the number of sequences it needs, `event` the usage event (JSON) that is recorded if its gateway dies. What its tenant is
    charged in the fair queue is divided by `share`. `head_start` is the number of earlier tickets of its tenant that it may go before
    (after, if negative). Tokens are estimates: of the prompt, and the most that the completion may have. `prices` are for prompt, cached
    and completion tokens, in micro-dollars per million tokens.
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
    #: It runs only on slots that interactive work leaves free, and may be put back.
    background: bool = False
    #: If its process dies, its usage event has the status UsageStatus.WASTED instead of LOST.
    durable: bool = False

    def sent(self) -> bytes:
        """Return the part that the scheduler stores as it is (`ticket_from` in layout.lua). Its last byte differs from that of most other
        tickets, for the reason that `tail_of` in layout.lua gives."""
        prompt, cached, completion = self.prices
        return _PACK(
            (
                self.id,
                self.tenant,
                self.gateway,
                self.adapter,
                self.source,
                self.weight,
                self.share,
                self.head_start,
                self.prompt_tokens,
                self.completion_tokens,
                prompt,
                cached,
                completion,
                self.background,
                self.durable,
                self.event,
                _tail(self.id),
            )
        )

    def terms(self, waited_ms: int, attempts: int, bounds: "Bounds") -> bytes:
        """Return the part that only one call needs: how long the ticket has waited, how often it was delivered, and its limits (`terms_of`
        in scheduler.lua)."""
        return _PACK((waited_ms, attempts, bounds.max_queued, bounds.max_queued_pool, self.limits))


@dataclass(frozen=True, slots=True)
class Bounds:
    """The number of tickets that may wait: of one tenant, and in the whole pool."""

    max_queued: int
    max_queued_pool: int


#: The bounds of a ticket that is not refused.
NO_BOUNDS = Bounds(0, 0)


@dataclass(frozen=True, slots=True)
class Seed:
    """The ledger's figures of a scope for a month (year x 100 + month, UTC): tokens, and picodollars."""

    month: int
    tokens: int
    cost_picousd: int


@dataclass(frozen=True, slots=True)
class Beat:
    """A supervisor's heartbeat about its replica. `resident` are the adapters on its engine."""

    url: str
    slots: int
    adapter_slots: int
    state: Observed
    resident: list[str]
    #: The engine has just generated a token.
    cleared: bool = False
    #: The engine seems to be stuck.
    suspect: bool = False
    #: The usual time of a start in this pool.
    start_ms: int | None = None
    #: The remaining time of this replica's own start, and the time by which it is late.
    left_ms: int | None = None
    late_ms: int | None = None


def connect(url: str) -> Redis:
    """Return a client that waits 5 s for a reply and retries a lost connection twice. Raises SettingsError for an invalid URL."""
    retry = Retry(ExponentialBackoff(cap=0.5, base=0.05), 2)
    options: dict[str, Any] = {"socket_timeout": 5, "socket_connect_timeout": 5, "health_check_interval": 15}
    try:
        return Redis.from_url(url, decode_responses=True, retry=retry, **options)
    except ValueError as error:
        raise SettingsError(f"LMAAS_REDIS_URL is not the URL of a Redis or Valkey server, such as redis://host:6379: {error}") from None


def gateway_channel(gateway: str) -> str:
    """Return the channel on which a gateway gets messages about its tickets."""
    return f"lmaas:gateway:{gateway}"


def replica_channel(replica: str) -> str:
    """Return the channel that wakes a supervisor to load an adapter or to probe its engine."""
    return f"lmaas:replica:{replica}"


def library() -> str:
    """Return the function library's text."""
    return "\n".join(Path(__file__).with_name(f"{part}.lua").read_text() for part in PARTS)


class Scheduler:
    """Calls the function library, and loads it into a server that does not have it (a new one, or one that has lost its memory).

    The names of the library and its functions contain a hash of its text. Servers keep functions across restarts, so a new version never
    runs as an old one, and both exist while a service is upgraded. Every call is atomic and affects one pool. A server that cannot be
    reached, or accepts no writes (out of memory, read only), raises Unavailable.
    """

    def __init__(self, redis: Redis, text: str | None = None) -> None:
        self._pipelined = PipelinedConnection(redis)
        self.redis = redis
        text = text or library()
        self._prefix = f"lmaas_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        self._library = text.replace("name=lmaas", f"name={self._prefix}", 1).replace("'lmaas_", f"'{self._prefix}_")
        #: The last state of each pool's memory that this client has seen: the server's process, and a mark that grows with every call.
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
        """Call a function with, as argument `at`, the last state of the pool that this client has seen. A server with an older memory (a
        snapshot, a replica that lagged) starts the pool anew."""
        told = self._memories.get(pool, "")
        reply = _DECODE(await self.call(function, pool, *args[:at], told, *args[at:]))
        self.saw(pool, reply.pop("memory"), told)
        return reply

    def saw(self, pool: str, memory: str, told: str | None = None) -> None:
        """Record the state of the pool's memory. That of an earlier process is kept until the server has received it."""
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
        """Queue a ticket and reserve its maximum usage. Returns a report, which is a grant if there is a free slot.

        The ticket was refused if `state` is one of REFUSALS. After UNSEEDED, submit it again with `seeds` for the `scopes` of the report,
        as of its `month`.
        """
        told = {scope: (seed.month, seed.tokens, seed.cost_picousd) for scope, seed in seeds.items()} if seeds else None
        terms = ticket.terms(waited_ms, attempts, bounds)
        reply = _DECODE(await self.call("submit", ticket.pool, ticket.sent(), terms, "" if told is None else _ENCODE(told)))
        if memory := reply.pop("memory", ""):
            self.saw(ticket.pool, memory)
        return reply

    async def release(self, ticket: Ticket, event: str, run_ms: int | None, used: TokenCounts | None = None) -> bool:
        """End a ticket, settle it to its usage `used` (None for nothing) and record its usage event, in one step.

        Returns False if the scheduler no longer had the ticket.
        """
        ran = "" if run_ms is None else run_ms
        return self.released(ticket, await self.call("release", ticket.pool, ticket.id, _told_apart(ticket, event), ran, _counts(used)))

    def send_release(self, ticket: Ticket, event: str, run_ms: int | None, used: TokenCounts | None) -> "asyncio.Future[Any]":
        """Send a release once, without waiting. The future gets a reply for `released`, or a RedisError."""
        name, key = f"{self._prefix}_release", f"lmaas:{{{ticket.pool}}}"
        ran = "" if run_ms is None else run_ms
        return self._pipelined.send("FCALL", name, 1, key, ticket.id, _told_apart(ticket, event), ran, _counts(used))

    def released(self, ticket: Ticket, reply: Any) -> bool:
        """Read the reply to a release. Returns False if the scheduler no longer had the ticket."""
        known, memory = reply
        if memory:
            self.saw(ticket.pool, memory)
        return bool(known)

    async def retry(self, ticket: Ticket, replica: str, reason: RetryReason, attempt: int) -> dict[str, Any]:
        """Put a granted ticket back, once. `attempt` is the delivery that failed, from 0."""
        return _DECODE(await self.call("retry", ticket.pool, ticket.id, replica, reason, attempt))

    async def renew(self, pool: str, progress: Sequence[tuple[str, TokenCounts | None]]) -> dict[str, Any]:
        """Keep tickets alive and return their states. `progress` is pairs of ticket id and the tokens so far, None before the first."""
        return await self._call_as_seen("renew", pool, *(part for name, counts in progress for part in (name, _counts(counts))))

    async def restore(self, ticket: Ticket, replica: str, *, waited_ms: int, attempts: int) -> bool:
        """Put back a running ticket that the scheduler has lost. Returns False while its replica is not back."""
        terms = ticket.terms(waited_ms, attempts, NO_BOUNDS)
        return bool(await self.call("restore", ticket.pool, ticket.sent(), terms, replica))

    async def heartbeat(self, pool: str, replica: str, beat: Beat) -> dict[str, Any]:
        """Report that a replica lives. Returns its state and the adapters that it should load."""
        fields = {name: value for name, value in asdict(beat).items() if value is not None}
        resident = _ENCODE(fields.pop("resident"))
        return await self._call_as_seen("heartbeat", pool, replica, _ENCODE(fields), resident, at=2)

    async def loaded(self, pool: str, replica: str, adapter: str) -> int:
        """Report that an adapter is resident. Grants the tickets that waited for it and returns their number."""
        return int(await self.call("loaded", pool, replica, adapter))

    async def load_failed(self, pool: str, replica: str, adapter: str, reason: str) -> int:
        """Report that an adapter cannot be loaded. Fails the tickets that waited for it and returns their number."""
        return int(await self.call("load_failed", pool, replica, adapter, reason))

    async def evict(self, pool: str, replica: str, adapter: str) -> bool:
        """Return whether the adapter may be unloaded now. If so, no more tickets are granted with it there."""
        return bool(await self.call("evict", pool, replica, adapter))

    async def drain(self, pool: str, replica: str) -> int:
        """Stop grants on this replica. Returns the slots in use, or -1 if the replica is unknown (until its next heartbeat)."""
        return int(await self.call("drain", pool, replica))

    async def deregister(self, pool: str, replica: str) -> None:
        """Remove a replica whose engine has ended."""
        await self.call("deregister", pool, replica)

    async def stats(self, pool: str, delay_ms: int = 0, first_ms: int = FIRST_START_MS) -> dict[str, Any]:
        """Return demand and replicas of a pool, and remove what has expired. Only the controller calls this, so replicas conclude from it
        that there is one. `delay_ms` is the current delay of starts, and `first_ms` the duration of a start if none of this pool is
        known."""
        told = self._memories.get(pool, "")
        head, replicas, due = await self.call("stats", pool, told, delay_ms, first_ms)
        reply = _DECODE(head)
        self.saw(pool, reply.pop("memory"), told)
        due_at = dict(zip(due[::2], due[1::2], strict=True))
        reply["replicas"] = {
            name: _seen(_facts(text), float(due_at[name]), reply) for name, text in zip(replicas[::2], replicas[1::2], strict=True)
        }
        for name in ("now", "stale_after", "gone_after"):
            del reply[name]
        return reply

    async def room(self, pool: str) -> dict[str, Any]:
        """Return the room of a pool for background work: `ready` (replicas that get work), their `slots`, the `room` (slots that background
        tickets could get now), and the background tickets that are `queued`."""
        return await self._call_as_seen("room", pool)

    async def record_event(self, pool: str, event: str) -> None:
        """Pass a usage event to the metering writer."""
        try:
            with unswallowed():
                await self.redis.xadd(f"lmaas:{{{pool}}}:usage", {"event": event})
        except RedisError as error:
            raise _away("record_event", error) from error

    async def listen(self, channel: str) -> AsyncIterator[str]:
        """Yield the messages on a channel, without end. Yields '' at every (re)connection, since earlier messages may have been missed."""
        while True:
            try:
                async with self.redis.pubsub() as subscription:
                    with unswallowed():
                        await subscription.subscribe(channel)
                    while True:
                        with unswallowed():
                            message = await subscription.get_message(timeout=5)
                        # The client library reconnects and subscribes again automatically, and only this message shows it.
                        if message is not None and message["type"] == "subscribe":
                            yield ""
                        elif message is not None and message["type"] == "message":
                            yield message["data"]
            except RedisError as error:
                log.warning("subscription to %s was lost", channel, extra={"action": "subscribe", "detail": str(error)})
                await asyncio.sleep(0.5)


def _tail(name: str) -> int:
    """Return a number below 64 that differs between names."""
    return hash(name) & 63


def _told_apart(ticket: Ticket, event: str) -> str:
    """Return the event with white space at its end, by which Lua distinguishes it from others quickly (`tail_of` in layout.lua)."""
    return event and event + _TAILS[_tail(ticket.id)]


def stored_replica(text: str) -> dict[str, Any]:
    """Decode a replica as the function library stores it (`text_of_replica` in fleet.lua)."""
    names = _DECODE("{" + text.split("\n", 3)[3] + "}")
    return {**_facts(text), "id": names["replica"], "url": names["url"]}


def _facts(text: str) -> dict[str, Any]:
    """Decode all of a stored replica but its names."""
    _, facts, rest, _ = text.split("\n", 3)
    *numbers, state = facts.split()
    return {**dict(zip(_NUMBERS, map(int, numbers), strict=True)), "state": state, **(_DECODE(rest) if rest else {})}


def _seen(replica: dict[str, Any], due: float, reply: Mapping[str, Any]) -> dict[str, Any]:
    """Return the controller's view of a replica. The time at which its silence matters next gives its last heartbeat (`beat_of`)."""
    return {
        "state": replica["state"],
        "load": replica["load"],
        "slots": replica["slots"],
        "background": replica["back"],
        "beat_ms": reply["now"] - int(due) + reply["gone_after" if replica.get("stale") else "stale_after"],
        "resident": replica["has"],
        "running": replica["runs"],
    }


def _counts(tokens: TokenCounts | None) -> bytes:
    """Encode token counts for the functions, which decode them with `tokens_of` (state.lua)."""
    return b"" if tokens is None else _ENCODE(tokens)


def _away(function: str, error: RedisError) -> Unavailable:
    if not isinstance(error, RedisConnectionError | RedisTimeout):
        # The server responds but refuses the call, so an operator must look.
        log.error("the queue refused", extra={"action": function, "detail": str(error)})
    return Unavailable("The request queue is not available. Retry after 2 s.", code="queue_unavailable", retry_after_s=2)
