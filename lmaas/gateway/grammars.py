"""Grammars that engines compile for requests: schemas, patterns, tools. Each new one is checked before any engine sees it.

An engine compiles the grammars of all tenants in one thread, and a schema of fifty bytes can keep that thread busy for ever. So a host
that has the engine installed compiles each new grammar first, in a disposable process under limits (lmaas/engine/grammars). The verdict
is kept here by the grammar's digest, so that a known grammar costs a look-up.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from lmaas.engine.client import CONNECTION_ERRORS, EngineClient
from lmaas.engine.grammars.verdict import KEY, UNKNOWN, Question, Verdict, decode_verdict, encode
from lmaas.errors import InvalidRequest, OverLimit, Unavailable
from lmaas.gateway.schemas import MAX_DEPTH, depth
from lmaas.observability import GatewayMetrics
from lmaas.store.models import BaseModel

#: The largest grammar of a request, tools included, as JSON; and its levels: the request's own around a schema.
MAX_BYTES = 256 * 1024
MAX_LEVELS = MAX_DEPTH + 8
#: What a tenant may have checked in each minute: new grammars, and seconds of CPU time for them.
WINDOW_S = 60.0
MAX_NEW = 300
MAX_CPU_S = 20.0
#: Verdicts that are kept, and tenants whose checks are counted.
KNOWN_VERDICTS = 20_000
KNOWN_TENANTS = 10_000
#: How long a checker's address is good for, and how long a check may take in all.
ADDRESS_S = 5.0
CHECK_S = 150.0
CONNECT_S = 2.0

Key = tuple[str, str, bytes]


@dataclass(slots=True)
class Checks:
    """A tenant's checks of the last minute: when each began, and when each ended with how much CPU time. They run one at a time."""

    began: deque[float] = field(default_factory=deque)
    ended: deque[tuple[float, float]] = field(default_factory=deque)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def refusal(self, now: float) -> OverLimit | None:
        """The error for one check more at `now`, if it is one too many."""
        while self.began and self.began[0] <= now - WINDOW_S:
            self.began.popleft()
        while self.ended and self.ended[0][0] <= now - WINDOW_S:
            self.ended.popleft()
        spent = sum(cpu_s for _, cpu_s in self.ended)
        if len(self.began) >= MAX_NEW:
            limit, oldest = f"{MAX_NEW} new schemas or sets of tools", self.began[0]
        elif spent >= MAX_CPU_S:
            limit, oldest = f"new schemas that need {MAX_CPU_S:g} s to compile; yours needed {spent:.0f} s", self.ended[0][0]
        else:
            return None
        return OverLimit(
            f"You may use {limit} in a minute. Schemas that you have used before do not count.",
            code="too_many_new_schemas",
            retry_after_s=oldest + WINDOW_S - now,
        )


class NoCheckerError(Exception):
    """No host that can check grammars is known."""


class Grammars:
    """Knows which grammars an engine may compile. One gateway's view; the checker of a host is asked once for each grammar."""

    def __init__(self, redis: Redis, client: EngineClient, metrics: GatewayMetrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis, self._client, self._metrics, self._clock = redis, client, metrics, clock
        self._verdicts: OrderedDict[Key, Verdict] = OrderedDict()
        self._tenants: OrderedDict[str, Checks] = OrderedDict()
        self._asking: dict[Key, asyncio.Task[Verdict]] = {}
        self._address: tuple[float, str] = (float("-inf"), "")

    async def admit(self, tenant_id: str, model: BaseModel, path: str, parameters: dict[str, Any]) -> bool:
        """Let the grammar of a request to `path` pass; `parameters` are those that it is made from, by name.

        Returns False if no checker is known: then no engine may have it yet. Raises InvalidRequest with the checker's reason, OverLimit
        `too_many_new_schemas`, and Unavailable if the checker fails.
        """
        text = encode(Question(path, parameters))
        key = (model.id, model.engine_args, hashlib.sha256(text).digest())
        verdict = self._verdicts.get(key)
        if verdict is None:
            _check_size(text, parameters)
            try:
                verdict = await self._asked(tenant_id, key, text)
            except NoCheckerError:
                return False
        if verdict.code:
            raise InvalidRequest(verdict.message, code=verdict.code, param=verdict.param or _source(parameters))
        return True

    async def _asked(self, tenant_id: str, key: Key, text: bytes) -> Verdict:
        """The checker's verdict; asked for once for all requests that wait for it."""
        asking = self._asking.get(key)
        if asking is None:
            checks = self._checks(tenant_id)
            refusal = checks.refusal(self._clock())
            if refusal is not None:
                raise refusal
            checks.began.append(self._clock())
            asking = self._asking[key] = asyncio.create_task(self._check(checks, key, text), name="grammar")
            asking.add_done_callback(lambda task: self._answered(key, task))
        return await asyncio.shield(asking)

    def _answered(self, key: Key, asking: "asyncio.Task[Verdict]") -> None:
        del self._asking[key]
        if not asking.cancelled() and asking.exception() is None:
            self._verdicts[key] = asking.result()
            if len(self._verdicts) > KNOWN_VERDICTS:
                self._verdicts.popitem(last=False)

    def _checks(self, tenant_id: str) -> Checks:
        checks = self._tenants.setdefault(tenant_id, Checks())
        self._tenants.move_to_end(tenant_id)
        if len(self._tenants) > KNOWN_TENANTS:
            self._tenants.popitem(last=False)
        return checks

    async def _check(self, checks: Checks, key: Key, text: bytes) -> Verdict:
        async with checks.turn:
            try:
                verdict = await self._exchange(key[0], text)
            except (*CONNECTION_ERRORS, msgspec.DecodeError) as error:
                self._address = (float("-inf"), "")
                raise _unavailable() from error
        checks.ended.append((self._clock(), verdict.cpu_s))
        self._metrics.grammars.labels(verdict.code or "passed").inc()
        if verdict.code == UNKNOWN:
            raise _unavailable()
        return verdict

    async def _exchange(self, model_id: str, text: bytes) -> Verdict:
        url = await self._checker()
        timeout = aiohttp.ClientTimeout(total=CHECK_S, sock_connect=CONNECT_S)
        async with self._client.session.post(f"{url}/check", params={"model": model_id}, data=text, timeout=timeout) as response:
            answer = await response.read()
            if response.status != 200:
                raise _unavailable()
            return decode_verdict(answer)

    async def _checker(self) -> str:
        now = self._clock()
        if now - self._address[0] > ADDRESS_S:
            try:
                self._address = (now, str(await self._redis.get(KEY) or ""))
            except RedisError as error:
                raise _unavailable() from error
        if not self._address[1]:
            self._address = (float("-inf"), "")
            raise NoCheckerError
        return self._address[1]


def _unavailable() -> Unavailable:
    return Unavailable(
        "The schema or the tools of this request cannot be checked at the moment. Please try again.",
        code="grammar_check_unavailable",
        retry_after_s=5,
    )


def _check_size(text: bytes, parameters: dict[str, Any]) -> None:
    """Raises InvalidRequest for a grammar that is too large to be looked at."""
    if len(text) <= MAX_BYTES and depth(parameters) <= MAX_LEVELS:
        return
    param = _source(parameters)
    raise InvalidRequest(
        f"'{param}' is too large: the schemas and tools of a request may have {MAX_BYTES} bytes and {MAX_DEPTH} levels.",
        code="invalid_schema",
        param=param,
    )


def _source(parameters: dict[str, Any]) -> str | None:
    """The parameter that a request's grammar comes from, where the checker cannot say."""
    return next((name for name in ("response_format", "structured_outputs", "tools") if parameters.get(name)), None)
