"""Delivers one request: sends it to an engine and passes the answer on to the client, streamed or whole."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import aiohttp

from lmaas.engine.client import CONNECTION_ERRORS, EngineClient, EngineError
from lmaas.errors import RequestFailed
from lmaas.inference.catalog import ServedModel
from lmaas.inference.engine_errors import EngineLost, meaning
from lmaas.metering.usage import UsageRecord
from lmaas.protocols import answers, sse
from lmaas.protocols.parameters.request import EngineRequest
from lmaas.scheduling.leases import Lease, OpenTicket
from lmaas.scheduling.states import RetryReason
from lmaas.web.call import STREAM_HEADERS, Call

log = logging.getLogger(__name__)

Given = ParamSpec("Given")
Answer = TypeVar("Answer")

#: The time that an engine may take to end a request whose client has disconnected. After that, its connection is closed.
ABORT_GRACE_S = 3.0
ABORT_AGAIN_S = 0.2
LAST = sse.DONE + b"\n\n"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One of OpenAI's endpoints: its path on the engine, and the prefix of the engine's request ids."""

    path: str
    id_prefix: str

    def engine_ids(self, request_id: str, prompts: int) -> list[str]:
        """Return the engine's ids of a request, by which it is aborted: one for each prompt of a completion."""
        if self.id_prefix == "cmpl":
            return [f"cmpl-{request_id}-{index}" for index in range(prompts)]
        return [f"{self.id_prefix}-{request_id}"]


class Interrupt:
    """A block that another task can end, like asyncio.timeout without a time limit. After `fire`, the block raises EngineLost."""

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None
        self._detail: str | None = None

    def fire(self, detail: str) -> None:
        """End the block, if it is still running."""
        if self._task is not None and self._detail is None:
            self._detail = detail
            self._task.cancel()

    def __enter__(self) -> "Interrupt":
        self._task = asyncio.current_task()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        task, self._task = self._task, None
        if self._detail is not None and task is not None and task.uncancel() == 0 and kind is not None:
            raise EngineLost(RetryReason.ENGINE, self._detail, revoked=True) from error


class Delivery:
    """The delivery of one request. Each `attempt` sends it to an engine and passes the answer on."""

    def __init__(
        self, call: Call, endpoint: Endpoint, request: EngineRequest, model: ServedModel, record: UsageRecord, client: EngineClient
    ) -> None:
        self._call, self._endpoint, self._request, self._model = call, endpoint, request, model
        self._record, self._client = record, client
        #: True once the client has received a byte of an answer. From then on, the request cannot be tried again.
        self.begun = False
        tier = "default" if request.service_tier in ("auto", "scale") else request.service_tier
        #: Fields about the service that every response has.
        self._facts = {"service_tier": tier, "system_fingerprint": model.fingerprint}

    async def attempt(self, lease: Lease, opened: OpenTicket, body: bytes) -> bytes:
        """Deliver once, and return the last bytes of the answer, which finish it.

        Raises EngineLost if the engine or its connection failed, InvalidRequest if the engine refused the request, RequestFailed if it
        cannot process it.
        """
        background: set[asyncio.Task[None]] = set()
        with Interrupt() as interrupt:
            opened.on_revoked(lambda: interrupt.fire("the replica was taken out of service"))

            def abort() -> None:
                background.add(asyncio.create_task(self._abort(lease, interrupt)))

            forget_abort = self._call.on_gone(abort)
            response, complete = None, False
            try:
                headers = {"x-request-id": self._call.request_id}
                response = await self._client.post(lease.url, self._endpoint.path, body, headers)
                if response.status != 200:
                    raise self._meaning(response.status, await response.read())
                rest = await (self._stream if self._request.stream else self._whole)(response)
                complete = True
            except CONNECTION_ERRORS as error:
                raise EngineLost(RetryReason.ENGINE, repr(error)) from error
            else:
                return rest
            finally:
                forget_abort()
                for task in background:
                    task.cancel()
                if response is not None:
                    self._client.let_go(response, complete=complete)

    async def _abort(self, lease: Lease, interrupt: Interrupt) -> None:
        """Have the engine end the request after the client has disconnected. Its answer still arrives, with the exact usage."""
        ids = self._endpoint.engine_ids(self._call.request_id, self._request.prompts)
        deadline = asyncio.get_running_loop().time() + ABORT_GRACE_S
        while asyncio.get_running_loop().time() < deadline:
            # More than once, because the request may reach the engine after the first abort.
            with contextlib.suppress(EngineError, *CONNECTION_ERRORS):
                await self._client.abort(lease.url, ids)
            await asyncio.sleep(ABORT_AGAIN_S)
        interrupt.fire("the client has gone")

    async def _stream(self, response: aiohttp.ClientResponse) -> bytes:
        rewrite = sse.Rewriter(
            self._model.engine_name,
            self._request.model,
            include_usage=self._request.include_usage,
            continuous_usage=self._request.continuous_usage,
            n=self._request.parameters.get("n", 1),
            prompts=self._request.prompts,
            facts=self._facts,
        )
        self._record.follow(lambda: rewrite.usage)
        try:
            # Events that arrived together are written together, because a write costs more than an event.
            async for chunk in response.content.iter_any():
                out = self._in_clients_form(_parsed(rewrite.feed, chunk))
                if rewrite.done and rewrite.complete and not rewrite.aborted:
                    await self._begin()
                    return out + LAST
                await self._pass_on(rewrite, out)
                if rewrite.done:
                    break
            else:
                await self._pass_on(rewrite, self._in_clients_form(_parsed(rewrite.close)))
        finally:
            self._record.follow(None)
        if not self._call.gone.is_set():
            raise EngineLost(RetryReason.ENGINE, "the stream ended early")
        return b""

    async def _pass_on(self, rewrite: sse.Rewriter, out: bytes) -> None:
        """Send the client's events. Raises an error if the engine has reported one or has ended the request."""
        if out:
            await self._begin()
            await self._call.write(out)
        if rewrite.error is not None:
            raise self._meaning(500, rewrite.error)
        if rewrite.aborted and not self._call.gone.is_set():
            raise EngineLost(RetryReason.ENGINE, "the engine ended the request")

    def _in_clients_form(self, events: bytes) -> bytes:
        """Return the events in the form that the client expects. For nearly all requests they are unchanged."""
        if events and (self._request.legacy_functions or self._request.only_echo):
            return answers.events_in_clients_form(events, self._request)
        return events

    def _meaning(self, status: int, text: bytes) -> Exception:
        error = meaning(status, text, self._model.engine_name, self._request, self._model.base.max_model_len)
        if isinstance(error, RequestFailed):
            log.error("an engine failed on one request", extra={"request_id": self._call.request_id, "tenant_id": self._record.tenant_id})
        return error

    async def _begin(self) -> None:
        await self._call.start(200, STREAM_HEADERS)
        self.begun = True

    async def _whole(self, response: aiohttp.ClientResponse) -> bytes:
        text = await response.read()
        answer, usage, aborted = _parsed(sse.rewrite_whole, text, self._model.engine_name, self._request.model, self._facts)
        self._record.count(usage)
        if aborted and not self._call.gone.is_set():
            raise EngineLost(RetryReason.ENGINE, "the engine ended the request")
        if self._request.legacy_functions or self._request.only_echo:
            answer = answers.in_clients_form(answer, self._request)
        self.begun = True
        await self._call.start(200, {"content-type": "application/json", "content-length": str(len(answer))})
        return answer


def _parsed(read: Callable[Given, Answer], *args: Given.args, **kwargs: Given.kwargs) -> Answer:
    """Return the result of `read` on the engine's bytes. Raises EngineLost if they cannot be parsed."""
    try:
        return read(*args, **kwargs)
    except ValueError as error:
        raise EngineLost(RetryReason.ENGINE, f"the engine's answer cannot be read: {error}") from error
