"""Delivers one inference: sends it to an engine, and passes the answer on to its sink, streamed or whole."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import aiohttp

from lmaas.engine.client import CONNECTION_ERRORS, EngineClient, EngineError
from lmaas.errors import InvalidRequest, RequestFailed
from lmaas.inference.engine_errors import EngineLost, meaning
from lmaas.inference.protocol import Answer, AnyInference
from lmaas.inference.sink import STREAM_HEADERS, Sink
from lmaas.scheduling.leases import Lease, OpenTicket
from lmaas.scheduling.states import RetryReason

log = logging.getLogger(__name__)

Given = ParamSpec("Given")
Parsed = TypeVar("Parsed")

#: The time that an engine may take to end a request whose client has disconnected. After that, its connection is closed.
ABORT_GRACE_S = 3.0
ABORT_AGAIN_S = 0.2


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
    """The delivery of one inference. Each `attempt` sends it to an engine and passes the answer on, except for its end."""

    def __init__(self, inference: AnyInference, sink: Sink, client: EngineClient) -> None:
        self._inference, self._sink, self._client = inference, sink, client
        #: True once the sink has received a byte of a stream's answer. From then on, the request cannot be tried again.
        self.begun = False

    async def attempt(self, lease: Lease, opened: OpenTicket) -> bytes:
        """Deliver once. Return events of a stream that have not been sent yet, which `Answer.end` follows.

        Raises EngineLost if the engine or its connection failed, InvalidRequest if the engine refused the request, RequestFailed if it
        cannot process it.
        """
        inference = self._inference
        background: set[asyncio.Task[None]] = set()
        rest = b""
        with Interrupt() as interrupt:
            opened.on_revoked(lambda: interrupt.fire("the replica was taken out of service"))

            def abort() -> None:
                background.add(asyncio.create_task(self._abort(lease, interrupt)))

            forget_abort = self._sink.on_gone(abort)
            opened.on_yielded(abort)
            try:
                for part in range(inference.request.parts):
                    if part and self._sink.gone.is_set():
                        break
                    body = inference.request.body(inference.engine_name, opened.ticket.tenant, part, inference.work.engine_priority)
                    rest = await self._send(lease, body)
            except CONNECTION_ERRORS as error:
                raise EngineLost(RetryReason.ENGINE, repr(error)) from error
            except (InvalidRequest, RequestFailed):
                if not inference.request.stream:
                    # If a later part was refused, the client gets nothing of the earlier ones, and is not charged for them.
                    inference.record.count({})
                raise
            finally:
                forget_abort()
                for task in background:
                    task.cancel()
        return rest

    async def _send(self, lease: Lease, body: bytes) -> bytes:
        """Send one part of the request, and read its answer."""
        inference = self._inference
        response, complete = None, False
        try:
            headers = {"x-request-id": inference.request_id}
            if inference.trace is not None:
                headers |= inference.trace.engine_headers()
            response = await self._client.post(lease.url, inference.protocol.engine_path, body, headers)
            if response.status != 200:
                raise self._meaning(response.status, await response.read())
            rest = await (self._stream if inference.request.stream else self._whole)(response, inference.answer)
            complete = True
        finally:
            if response is not None:
                self._client.let_go(response, complete=complete)
        return rest

    async def _abort(self, lease: Lease, interrupt: Interrupt) -> None:
        """Have the engine end the request after the client has disconnected. Its answer still arrives, with the exact usage."""
        ids = self._inference.protocol.engine_ids(self._inference.request_id, self._inference.request)
        deadline = asyncio.get_running_loop().time() + ABORT_GRACE_S
        while asyncio.get_running_loop().time() < deadline:
            # More than once, because the request may reach the engine after the first abort.
            if ids:
                with contextlib.suppress(EngineError, *CONNECTION_ERRORS):
                    await self._client.abort(lease.url, ids)
            await asyncio.sleep(ABORT_AGAIN_S)
        interrupt.fire("the client has gone")

    async def _stream(self, response: aiohttp.ClientResponse, answer: Answer) -> bytes:
        record = self._inference.record
        record.follow(lambda: answer.usage)
        try:
            # Events that arrived together are written together, because a write costs more than an event.
            async for chunk in response.content.iter_any():
                out = _parsed(answer.feed, chunk)
                if answer.done and answer.complete and not answer.aborted:
                    await self._begin()
                    return out
                await self._pass_on(answer, out)
                if answer.done:
                    break
            else:
                await self._pass_on(answer, _parsed(answer.close))
        finally:
            record.follow(None)
        if not self._sink.gone.is_set():
            raise EngineLost(RetryReason.ENGINE, "the stream ended early")
        return b""

    async def _pass_on(self, answer: Answer, out: bytes) -> None:
        """Send the client's events. Raises an error if the engine has reported one or has ended the request."""
        if out:
            await self._begin()
            await self._sink.write(out)
        if answer.error is not None:
            raise self._meaning(500, answer.error)
        if answer.aborted and not self._sink.gone.is_set():
            raise EngineLost(RetryReason.ENGINE, "the engine ended the request")

    def _meaning(self, status: int, text: bytes) -> Exception:
        inference = self._inference
        error = meaning(status, text, inference.engine_name, inference.request, inference.model.base.max_model_len)
        if isinstance(error, RequestFailed):
            log.error("an engine failed on one request", extra={"request_id": inference.request_id, "tenant_id": inference.tenant_id})
        return error

    async def _begin(self) -> None:
        if not self.begun:
            self.begun, self._inference.first_sent = True, time.monotonic()
            if self._inference.trace is not None:
                self._inference.trace.mark("first_token")
        await self._sink.start(200, STREAM_HEADERS)

    async def _whole(self, response: aiohttp.ClientResponse, answer: Answer) -> bytes:
        text = await response.read()
        _parsed(answer.take, text)
        self._inference.record.count(answer.usage or {})
        if answer.aborted and not self._sink.gone.is_set():
            raise EngineLost(RetryReason.ENGINE, "the engine ended the request")
        return b""


def _parsed(read: Callable[Given, Parsed], *args: Given.args, **kwargs: Given.kwargs) -> Parsed:
    """Return the result of `read` on the engine's bytes. Raises EngineLost if they cannot be parsed."""
    try:
        return read(*args, **kwargs)
    except ValueError as error:
        raise EngineLost(RetryReason.ENGINE, f"the engine's answer cannot be read: {error}") from error
