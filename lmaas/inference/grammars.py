"""Checks of the grammars that engines compile for requests: schemas, patterns, tools. Each new grammar is checked before an engine receives
it.

An engine compiles the grammars of all tenants in one thread, and a schema of fifty bytes can block that thread forever. A host that runs
engines therefore compiles each new grammar first, in a disposable process with limits (lmaas/engine/grammars). The verdict is cached here
by the grammar's digest, so that a known grammar costs one look-up.
"""

import asyncio
import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lmaas.engine.grammars.verdict import TOO_COMPLEX, UNKNOWN, Question, Verdict, decode_verdict, encode
from lmaas.errors import InvalidRequest, OverLimit, Unavailable
from lmaas.inference.checker_hosts import CheckerHosts, CheckerUnavailable
from lmaas.inference.recent_work import RecentWork, WorkOfTenants
from lmaas.inference.schemas import MAX_DEPTH, depth
from lmaas.observability import GatewayMetrics
from lmaas.store.models import BaseModel

#: The largest grammar of a request, tools included, as JSON, and its maximum depth, which includes the request's own levels around a
#: schema.
MAX_BYTES = 256 * 1024
MAX_LEVELS = MAX_DEPTH + 8
#: The maximum number of new grammars that a tenant uses in a minute at one gateway.
MAX_NEW = 300
#: Expensive grammars also count when they are used, unless the tenant has used them recently, because an engine may have to compile them
#: again.
EXPENSIVE_S, MAX_LATELY = 0.25, 16
#: The lifetime of the verdict "too complex". It depends on measured time, which is longer on a busy machine.
TOO_COMPLEX_S = 600.0
#: The maximum number of cached verdicts.
KNOWN_VERDICTS = 20_000

Key = tuple[str, str, bytes]


class Lookup(msgspec.Struct, frozen=True):
    """The grammar of a request to an engine of `model_id`: the question for a checker, as JSON, and the verdict if it is known. A
    msgspec.Struct, because one is created for every request with a grammar."""

    model_id: str
    key: Key
    text: bytes
    verdict: Verdict | None


@dataclass(slots=True)
class Checks(RecentWork):
    """A tenant's checks of the last minute."""

    most = MAX_NEW
    code = "too_many_new_schemas"
    too_many = f"You have used {MAX_NEW} new schemas or sets of tools"
    too_long = "Your new schemas have needed"
    exempt = " Schemas that you have used before do not count."

    #: The expensive grammars that were used most recently.
    lately: OrderedDict[Key, None] = field(default_factory=OrderedDict)
    asking: "dict[Key, asyncio.Task[Verdict]]" = field(default_factory=dict)

    def use(self, key: Key, cpu_s: float, now: float) -> None:
        """Count the use of an expensive grammar. Raises OverLimit."""
        if key not in self.lately:
            self.spend(now)
            self.ended.append((now, cpu_s))
        self.lately[key] = None
        self.lately.move_to_end(key)
        if len(self.lately) > MAX_LATELY:
            self.lately.popitem(last=False)


class Grammars:
    """The verdicts of one gateway about grammars."""

    def __init__(
        self,
        hosts: CheckerHosts,
        metrics: GatewayMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.hosts, self._metrics, self._clock = hosts, metrics, clock
        #: Each verdict with the time at which it expires.
        self._verdicts: OrderedDict[Key, tuple[Verdict, float]] = OrderedDict()
        self._tenants = WorkOfTenants(Checks)

    def look_up(self, tenant_id: str, model: BaseModel, path: str, parameters: dict[str, Any], field: str) -> Lookup:
        """Look up the grammar of a request to `path`. `parameters` are those that it is made from, by name; `field` is the client's field.

        Raises InvalidRequest if it is too large, and OverLimit `too_many_new_schemas` if the tenant uses too many expensive ones.
        """
        text = encode(Question(path, parameters))
        key = (model.id, model.engine_args, hashlib.sha256(text).digest())
        known = self._verdicts.get(key)
        if known is None or (known[1] != math.inf and known[1] <= self._clock()):
            _check_size(text, parameters, field)
            return Lookup(model.id, key, text, None)
        verdict = known[0]
        if verdict.cpu_s > EXPENSIVE_S and not verdict.code:
            self._tenants.of(tenant_id).use(key, verdict.cpu_s, self._clock())
        return Lookup(model.id, key, text, verdict)

    async def check(self, tenant_id: str, lookup: Lookup, max_waiting: int) -> Verdict:
        """Have a new grammar checked. The tenant's requests for the same grammar share one check, and its checks run one after the other.

        Raises OverLimit beyond `max_waiting` requests of the tenant that wait, or beyond what it may have checked in a minute; Unavailable
        if the checker fails; NoCheckerError if none is known.
        """
        checks = self._tenants.of(tenant_id)
        if checks.waiting >= max_waiting:
            raise OverLimit(
                f"You have {max_waiting} queued requests, the maximum for this tenant. Retry after 5 s, or raise max_queued.",
                code="queue_full",
                retry_after_s=5,
            )
        try:
            await self.hosts.address(lookup.model_id)
        except CheckerUnavailable as error:
            raise unavailable() from error
        checks.waiting += 1
        try:
            asking = checks.asking.get(lookup.key)
            if asking is None:
                checks.begin(self._clock())
                asking = checks.asking[lookup.key] = asyncio.create_task(self._ask(checks, lookup), name="grammar")
                asking.add_done_callback(lambda task: _answered(checks, lookup.key, task))
            return await asyncio.shield(asking)
        finally:
            checks.waiting -= 1

    async def _ask(self, checks: Checks, lookup: Lookup) -> Verdict:
        async with checks.turn:
            # Another tenant may have had the grammar checked meanwhile, and the tenant's earlier checks may have used up its time.
            known = self._verdicts.get(lookup.key)
            if known is not None and known[1] > self._clock():
                return known[0]
            checks.spend(self._clock())
            verdict = await self._verdict(lookup)
            checks.ended.append((self._clock(), verdict.cpu_s))
        self._metrics.grammars.labels(verdict.code or "passed").inc()
        if verdict.code == UNKNOWN:
            raise unavailable()
        self._verdicts[lookup.key] = (verdict, self._clock() + TOO_COMPLEX_S if verdict.code == TOO_COMPLEX else math.inf)
        if len(self._verdicts) > KNOWN_VERDICTS:
            self._verdicts.popitem(last=False)
        return verdict

    async def _verdict(self, lookup: Lookup) -> Verdict:
        """Get a checker's verdict. Raises Unavailable."""
        try:
            return await self.hosts.ask("/check", lookup.model_id, lookup.text, decode_verdict)
        except CheckerUnavailable as error:
            raise unavailable() from error


def _answered(checks: Checks, key: Key, asking: "asyncio.Task[Verdict]") -> None:
    del checks.asking[key]
    if not asking.cancelled():
        asking.exception()  # requests that still wait receive it; without any, it must not be logged as unretrieved


def unavailable() -> Unavailable:
    """Return the error for a grammar that cannot be checked now."""
    return Unavailable(
        "The schema or the tools of this request cannot be checked now, because no grammar checker responds. Retry after 5 s.",
        code="grammar_check_unavailable",
        retry_after_s=5,
    )


def _check_size(text: bytes, parameters: dict[str, Any], field: str) -> None:
    """Raise InvalidRequest for a grammar that is too large to be checked."""
    if len(text) <= MAX_BYTES and depth(parameters) <= MAX_LEVELS:
        return
    raise InvalidRequest(
        f"'{field}' is too large: the schemas and tools of a request may have at most {MAX_BYTES} bytes and {MAX_DEPTH} levels.",
        code="invalid_schema",
        param=field,
    )
