"""The tokens of prompts: counted as an engine counts them, but without one. A count costs nothing, and no engine starts for it.

A host that has the model's files reads the prompt, in a disposable process with limits (lmaas/engine/grammars). Nothing is cached and
nothing is metered. Each gateway limits what a tenant may have read in a minute.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lmaas.engine.grammars.verdict import TOO_COMPLEX, UNKNOWN, Prompt, Tokens, decode_tokens, encode
from lmaas.errors import InvalidRequest, OverLimit, Unavailable
from lmaas.inference.catalog import Catalog
from lmaas.inference.checker_hosts import CheckerHosts, CheckerUnavailable, NoCheckerError
from lmaas.inference.grammars import Grammars
from lmaas.inference.recent_work import RecentWork, WorkOfTenants
from lmaas.inference.request import EngineRequest
from lmaas.inference.sink import Sink
from lmaas.states import PoolKind
from lmaas.store.models import BaseModel
from lmaas.types import Principal

#: The maximum number of a tenant's prompts that one gateway has read in a minute.
MAX_PROMPTS = 600
#: The maximum time for which a request waits for its tokens. Proxies close connections that are silent for a minute.
WAIT_S = 50.0


@dataclass(slots=True)
class PromptRequest:
    """A checked request for the tokens of a prompt. `path` and `parameters` are those of the engine's request that has this prompt.

    `request` is that request, if the prompt is one of a request to generate; then `parameters` are its own, which `expand` may change.
    `ids` and `strings` are whether the tokens themselves are wanted beside their number.
    """

    model: str
    path: str
    parameters: dict[str, Any]
    request: EngineRequest | None = None
    ids: bool = False
    strings: bool = False

    @classmethod
    def of(cls, request: EngineRequest, path: str, *, ids: bool = False, strings: bool = False) -> "PromptRequest":
        """Return the request for the tokens of the prompt of `request`, which would be sent to `path` of an engine."""
        return cls(request.model, path, request.parameters, request, ids, strings)


class Counting(ABC):
    """An endpoint that reports the tokens of prompts in the shape of a client protocol."""

    path: str
    #: The top-level fields whose strings are for a model: they may have NUL, and half a surrogate pair in them is replaced.
    texts: tuple[str, ...] = ()

    @abstractmethod
    def read(self, body: dict[str, Any]) -> PromptRequest:
        """Check a client's body. Raises InvalidRequest with the field that is wrong."""

    async def expand(self, tenant_id: str, asked: PromptRequest) -> None:  # noqa: B027 (most protocols have no state)
        """Add what the request refers to, such as the items of an earlier response. Raises NotFound."""

    @abstractmethod
    def answer(self, tokens: Tokens, model: BaseModel) -> dict[str, Any]:
        """Return the client's body."""


class Readings(RecentWork):
    """A tenant's prompts of the last minute."""

    __slots__ = ()

    most = MAX_PROMPTS
    code = "too_many_token_counts"
    too_many = f"You have had the tokens of {MAX_PROMPTS} prompts counted"
    too_long = "Counting your tokens has needed"


class PromptReaders:
    """Has the prompts of one gateway's tenants read, within their limits."""

    def __init__(self, hosts: CheckerHosts, clock: Callable[[], float] = time.monotonic) -> None:
        self._hosts, self._clock = hosts, clock
        self._tenants = WorkOfTenants(Readings)
        self._reading: set[asyncio.Task[Tokens]] = set()

    async def read(self, tenant_id: str, model: BaseModel, prompt: Prompt, max_waiting: int) -> Tokens:
        """Return the tokens of a prompt for this base model. A tenant's prompts are read one after the other.

        Raises OverLimit beyond `max_waiting` requests of the tenant that wait, or beyond what it may have read in a minute; Unavailable if
        no host has read the prompt.
        """
        readings = self._tenants.of(tenant_id)
        if readings.waiting >= max_waiting:
            raise OverLimit(
                f"You have {max_waiting} requests that wait for their tokens, the maximum for this tenant. Retry after 5 s.",
                code="queue_full",
                retry_after_s=5,
            )
        # A task of its own: a prompt whose client has left is read to its end, and must count for its tenant.
        reading = asyncio.create_task(self._read(readings, model, prompt), name="prompt")
        self._reading.add(reading)
        reading.add_done_callback(self._done)
        try:
            async with asyncio.timeout(WAIT_S):
                tokens = await asyncio.shield(reading)
        except TimeoutError:
            raise _unavailable() from None
        if tokens.code == UNKNOWN:
            raise _unavailable()
        return tokens

    async def _read(self, readings: Readings, model: BaseModel, prompt: Prompt) -> Tokens:
        readings.waiting += 1
        try:
            async with readings.turn:
                readings.begin(self._clock())
                tokens = await self._ask(model, prompt)
                readings.ended.append((self._clock(), tokens.cpu_s))
                return tokens
        finally:
            readings.waiting -= 1

    def _done(self, reading: "asyncio.Task[Tokens]") -> None:
        self._reading.discard(reading)
        if not reading.cancelled():
            reading.exception()  # the request receives it; without one, it must not be logged as unretrieved

    async def _ask(self, model: BaseModel, prompt: Prompt) -> Tokens:
        try:
            await self._hosts.address(model.id)
            return await self._hosts.ask("/tokens", model.id, encode(prompt), decode_tokens)
        except NoCheckerError:
            raise _no_host(model) from None
        except CheckerUnavailable as error:
            raise _unavailable() from error


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Serves requests for the tokens of prompts."""

    catalog: Catalog
    grammars: Grammars
    readers: PromptReaders

    async def serve(self, principal: Principal, counting: Counting, asked: PromptRequest, sink: Sink) -> dict[str, Any]:
        """Return the client's body, and name the model in the head of the response. Raises an LmaasError."""
        tenant_id = principal.tenant_id or ""
        model = await self.catalog.resolve(tenant_id, asked.model)
        sink.add_to_head(model.head_line)
        if asked.request is not None:
            model.check_kind(PoolKind.GENERATE, asked.model, counting.path)
        await counting.expand(tenant_id, asked)
        if asked.request is not None:
            asked.request.check(model.base)
            await self._settle_tools(principal, model.base, asked.request, asked.path)
        prompt = Prompt(asked.path, asked.parameters, asked.ids, asked.strings)
        tokens = await self.readers.read(tenant_id, model.base, prompt, principal.max_queued)
        if tokens.code:
            code = "prompt_too_long" if tokens.code == TOO_COMPLEX else "invalid_prompt"
            raise InvalidRequest(tokens.message, code=code, param=_field(asked, tokens.param))
        return counting.answer(tokens, model.base)

    async def _settle_tools(self, principal: Principal, model: BaseModel, request: EngineRequest, path: str) -> None:
        """Take the tools as the client sent them if an engine could not enforce them, as the path of a request does."""
        if not request.tools_as_sent:
            return
        tenant_id = principal.tenant_id or ""
        lookup = self.grammars.look_up(tenant_id, model, path, request.grammar, request.grammar_field)
        try:
            verdict = lookup.verdict or await self.grammars.check(tenant_id, lookup, principal.max_queued)
        except NoCheckerError:
            raise _no_host(model) from None
        if verdict.code and verdict.param in ("", "tools"):
            request.loosen()


def _field(asked: PromptRequest, param: str) -> str | None:
    """Return the client's field for a parameter of the engine."""
    name = param.removeprefix("body.").partition(".")[0]
    return (asked.request.clients_name(name) if asked.request is not None else name) or None


def _unavailable() -> Unavailable:
    return Unavailable(
        "The tokens cannot be counted now, because no host that can read the prompt responds. Retry after 5 s.",
        code="tokenizer_unavailable",
        retry_after_s=5,
    )


def _no_host(model: BaseModel) -> Unavailable:
    return Unavailable(
        f"No host that has the files of '{model.name}' is running, so its tokens cannot be counted. Send the model a request, which starts "
        "one, or retry later.",
        code="tokenizer_unavailable",
        retry_after_s=30,
    )
