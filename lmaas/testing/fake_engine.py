"""A stand-in for vLLM without a model: the part of vLLM 0.32's HTTP API that lmaas uses. For tests, and for benchmarks of the gateway.

`tests/system/engine/test_contract.py` makes the same assertions about it and about vLLM. It accepts vLLM's command line and some `--fake-*`
arguments. Every `--fake-token-ms`, each running sequence generates one token, which is a word. The words depend only on the model's name
and the prompt, so two adapters give visibly different text. Up to `--max-num-seqs` sequences run at once, with at most `--max-loras`
adapters; others wait. With `--runner pooling` it embeds instead: each input takes one step.
"""

import argparse
import asyncio
import json
import logging
import os
import secrets
import socket
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lmaas.engine.cpu_lora.plugin import ACTIVE_MARK
from lmaas.engine.grammars.verdict import DETOKENIZE, Prompt, Tokens
from lmaas.states import PoolKind
from lmaas.testing.answer import Answer, compact
from lmaas.testing.generation import Engine, Sequence, called, prompt_blocks, write
from lmaas.testing.pooling import Pooling, PoolingAnswer
from lmaas.testing.traced import Traced
from lmaas.testing.truth import TruthLog

log = logging.getLogger("lmaas.testing.fake_engine")


class Refused(Exception):
    """An error in vLLM's format."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


#: A text in a request that makes this server return an internal error, as some values do in vLLM's API server.
FAILS_ON = b"fail on this request"
#: The response to requests that are running when the engine is stopped.
DIED = Refused(500, "InternalServerError", "EngineCore encountered an issue. See stack trace (above) for the root cause.")


async def _answer_refused(_: Request, error: Exception) -> Response:
    refused = error if isinstance(error, Refused) else DIED
    return Response(compact(refused.body), refused.status, media_type="application/json")


class Completions:
    """An ASGI endpoint for chat completions or completions, plain or streaming."""

    def __init__(self, engine: Engine, accept_s: float, poison: bytes, *, chat: bool) -> None:
        self._engine, self._accept_s, self._poison, self._chat = engine, accept_s, poison, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. It ends if the client disconnects."""
        request = Request(scope, receive)
        wake = asyncio.Event()
        text = await request.body()
        if self._poison and self._poison in text:
            os.abort()
        if FAILS_ON in text:
            raise Refused(500, "InternalServerError", "maximum recursion depth exceeded while calling a Python object")
        body = _parse(text)
        await asyncio.sleep(self._accept_s)
        prompts = self._sequences(body, wake)
        own_id = request.headers.get("x-request-id") or secrets.token_hex(8)
        answer_id = f"chatcmpl-{own_id}" if self._chat else f"cmpl-{own_id}"
        names = [answer_id] if self._chat else [f"{answer_id}-{index}" for index in range(len(prompts))]
        sequences = [sequence for choices in prompts for sequence in choices]
        for sequence in sequences:
            sequence.request = own_id
        self._engine.requests.update(zip(names, prompts, strict=True))
        self._engine.add(sequences)
        watch = asyncio.create_task(self._watch(receive, sequences))
        try:
            answer = Answer(answer_id, body["model"], prompts, chat=self._chat)
            await (self._stream if body.get("stream") else self._whole)(answer, body, wake, send)
        finally:
            watch.cancel()
            for name in names:
                self._engine.requests.pop(name, None)
            for sequence in sequences:
                self._engine.finish(sequence, b"abort")

    async def _watch(self, receive: Receive, sequences: list[Sequence]) -> None:
        await _hung_up(receive)
        for sequence in sequences:
            self._engine.finish(sequence, b"abort")

    async def _whole(self, answer: "Answer", _: dict[str, Any], wake: asyncio.Event, send: Send) -> None:
        while any(sequence.finish is None for sequence in answer.sequences):
            wake.clear()
            await wake.wait()
        died = any(sequence.finish == b"error" for sequence in answer.sequences)
        await _start(send, 500 if died else 200, b"application/json")
        await send({"type": "http.response.body", "body": compact(DIED.body) if died else answer.whole()})

    async def _stream(self, answer: "Answer", body: dict[str, Any], wake: asyncio.Event, send: Send) -> None:
        options = body.get("stream_options") or {}
        usage = bool(options.get("include_usage"))
        continuous = usage and bool(options.get("continuous_usage_stats"))
        await _start(send, 200, b"text/event-stream; charset=utf-8")
        while True:
            await wake.wait()
            wake.clear()
            if any(sequence.finish == b"error" for sequence in answer.sequences):
                last = b"data: " + json.dumps(DIED.body).encode() + b"\n\ndata: [DONE]\n\n"
                await send({"type": "http.response.body", "body": last})
                return
            chunks = answer.chunks(continuous=continuous, usage=usage)
            if all(sequence.told for sequence in answer.sequences):
                await send({"type": "http.response.body", "body": chunks + (answer.last() if usage else b"") + b"data: [DONE]\n\n"})
                return
            await send({"type": "http.response.body", "body": chunks, "more_body": True})

    def _sequences(self, body: dict[str, Any], wake: asyncio.Event) -> list[list[Sequence]]:
        """Return the choices for each prompt. Raises Refused."""
        model = body.get("model")
        if model != self._engine.name and model not in self._engine.adapters:
            aliases = self._engine.name
            raise Refused(404, "NotFoundError", f"The model `{model}` does not exist. Valid aliases: {aliases}.", "model")
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        length = self._engine.max_model_len
        if limit is not None and limit > length:
            rule = f"max_tokens={limit} cannot be greater than max_model_len={length}. Please request fewer output tokens."
            raise Refused(400, "BadRequestError", f"{rule} (parameter=max_tokens, value={limit})", "max_tokens")
        count = body.get("n") or 1
        if count > 1 and body.get("temperature") == 0:
            raise Refused(400, "BadRequestError", f"n must be 1 when using greedy sampling, got {count}.")
        given = [_chat_prompt(body["messages"])] if self._chat else _prompts(body["prompt"])
        prompts: list[list[Sequence]] = []
        for prompt in given:
            tokens = prompt.split() if isinstance(prompt, str) else prompt
            size = max(1, len(tokens))
            if size > length:
                about = f"at least {length + 1}" if isinstance(prompt, str) else str(size)
                value = about.rpartition(" ")[2]
                message = (
                    f"This model's maximum context length is {length} tokens. However, your prompt contains {about} input tokens, which "
                    "exceeds this limit even without any output tokens. Please reduce the length of the input prompt. "
                )
                raise Refused(400, "BadRequestError", f"{message}(parameter=input_tokens, value={value})", "input_tokens")
            if size == length:
                raise Refused(400, "BadRequestError", "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)", "max_tokens")
            blocks = prompt_blocks((model, body.get("cache_salt")), tokens)
            # A completion beyond the context length is cut off without an error.
            fits = min(length if limit is None else limit, length - size)
            choices = []
            for choice in range(count):
                seed = zlib.crc32(f"{model}\0{prompt}\0{choice}".encode(errors="replace"))
                pieces, end, stop = write(seed, fits, body, prompt if body.get("echo") and isinstance(prompt, str) else "", self._chat)
                call = called(body) if self._chat else None
                index, priority = choice + len(prompts) * count, body.get("priority") or 0
                choices.append(Sequence(index, model, size, blocks, pieces, end, stop, wake, call=call, priority=priority))
            prompts.append(choices)
        return prompts


class Pooled:
    """An ASGI endpoint of a pooling engine."""

    def __init__(self, answer: PoolingAnswer, accept_s: float, poison: bytes) -> None:
        self._answer, self._accept_s, self._poison = answer, accept_s, poison

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. It ends if the client disconnects."""
        request = Request(scope, receive)
        text = await request.body()
        if self._poison and self._poison in text:
            os.abort()
        if FAILS_ON in text:
            raise Refused(500, "InternalServerError", "maximum recursion depth exceeded while calling a Python object")
        body = _parse(text)
        await asyncio.sleep(self._accept_s)
        working = asyncio.ensure_future(self._answer(request, body))
        watching = asyncio.create_task(_hung_up(receive))
        try:
            await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                answer = working.result()
                await _start(send, 500 if answer is None else 200, b"application/json")
                await send({"type": "http.response.body", "body": compact(DIED.body) if answer is None else answer})
        finally:
            working.cancel()
            watching.cancel()


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _parse(text: bytes) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError as error:
        raise Refused(400, "Bad Request", f"1 validation error:\n  {error}", "body") from None
    if not isinstance(body, dict):
        raise Refused(400, "Bad Request", "1 validation error:\n  not an object", "body")
    return body


def _chat_prompt(messages: list[dict[str, Any]]) -> str:
    parts = []
    for message in messages:
        content = message.get("content") or ""
        text = content if isinstance(content, str) else " ".join(part["text"] for part in content)
        for call in message.get("tool_calls") or ():
            text += f" <call> {call['function']['name']} {call['function']['arguments']}"
        parts.append(f"<{message['role']}> {text} <end>")
    return " ".join(parts)


def _prompts(prompt: Any) -> list[Any]:
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def read_prompt(prompt: Prompt, kind: PoolKind) -> Tokens:
    """Return the tokens of a prompt as this engine counts them: one for each word, with a number made of it. Their text is lost.

    A pooling engine puts a text between two special tokens.
    """
    given: Any = prompt.parameters
    if prompt.path == DETOKENIZE:
        return Tokens(count=len(given["tokens"]), text=" ".join(f"word{token}" for token in given["tokens"]))
    words: list[Any] = []
    for one in [_chat_prompt(given["messages"])] if "messages" in given else _prompts(given["prompt"]):
        words += one.split() if isinstance(one, str) else one
    if kind is PoolKind.EMBED and given.get("add_special_tokens", True):
        words = ["[CLS]", *words, "[SEP]"]
    ids = [word if isinstance(word, int) else zlib.crc32(word.encode(errors="replace")) % 50_000 for word in words]
    return Tokens(count=len(ids), ids=ids if prompt.ids else [], strings=[str(word) for word in words] if prompt.strings else [])


async def _start(send: Send, status: int, kind: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})


async def _abort(engine: Engine, request: Request) -> Response:
    for name in (await request.json())["request_ids"]:
        for sequence in engine.requests.get(name, ()):
            engine.finish(sequence, b"abort")
    return Response()


async def _load(engine: Engine, request: Request) -> Response:
    body = await request.json()
    name, folder = body["lora_name"], Path(body["lora_path"])
    if name == engine.name:
        raise Refused(400, "InvalidUserInput", f"The lora adapter '{name}' conflicts with a served base model.")
    if name in engine.adapters:
        hint = "If you want to load the adapter in place, set 'load_inplace' to True."
        raise Refused(400, "InvalidUserInput", f"The lora adapter '{name}' has already been loaded. {hint}")
    config = folder / "adapter_config.json"
    if not config.is_file():
        raise Refused(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for <path>")
    try:
        json.loads(config.read_bytes())["r"]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(500, "InternalServerError", f"Call to add_lora method failed: {error!r}") from None
    engine.adapters[name] = str(folder)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def _unload(engine: Engine, request: Request) -> Response:
    name = (await request.json())["lora_name"]
    if engine.adapters.pop(name, None) is None:
        raise Refused(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def _models(engine: Engine, _: Request) -> Response:
    cards = [{"id": engine.name, "object": "model", "owned_by": "vllm", "parent": None, "max_model_len": engine.max_model_len}]
    cards += [
        {"id": name, "object": "model", "owned_by": "vllm", "parent": engine.name, "root": path} for name, path in engine.adapters.items()
    ]
    return Response(compact({"object": "list", "data": cards}), media_type="application/json")


async def _health(_: Request) -> Response:
    return Response()


async def _metrics(engine: Engine, _: Request) -> Response:
    return PlainTextResponse(engine.metrics())


def _generating(engine: Engine, accept_s: float, poison: bytes) -> list[Route]:
    return [
        Route("/v1/chat/completions", Completions(engine, accept_s, poison, chat=True), methods=["POST"]),
        Route("/v1/completions", Completions(engine, accept_s, poison, chat=False), methods=["POST"]),
        Route("/inference/v1/abort_requests", partial(_abort, engine), methods=["POST"]),
    ]


def _pooling(pooling: Pooling, accept_s: float, poison: bytes) -> list[Route]:
    answers = {
        "/v1/embeddings": pooling.embeddings,
        "/score": pooling.scores,
        "/v1/score": pooling.scores,
        "/rerank": pooling.ranking,
        "/v1/rerank": pooling.ranking,
    }
    return [Route(path, Pooled(answer, accept_s, poison), methods=["POST"]) for path, answer in answers.items()]


def build(engine: Engine, accept_s: float, poison: bytes, pooling: Pooling | None = None) -> Starlette:
    """Return the server's application: one that embeds with `pooling`, otherwise one that generates."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        working = asyncio.create_task(engine.work(), name="engine")
        yield
        working.cancel()

    return Starlette(
        routes=[
            *(_generating(engine, accept_s, poison) if pooling is None else _pooling(pooling, accept_s, poison)),
            Route("/v1/load_lora_adapter", partial(_load, engine), methods=["POST"]),
            Route("/v1/unload_lora_adapter", partial(_unload, engine), methods=["POST"]),
            Route("/v1/models", partial(_models, engine)),
            Route("/metrics", partial(_metrics, engine)),
            Route("/health", _health),
        ],
        lifespan=lifespan,
        exception_handlers={Refused: _answer_refused},
    )


class Server(uvicorn.Server):
    """A server that fails running requests when it is stopped, as vLLM does."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the server."""
        self._engine.die()
        await super().shutdown(sockets)


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description="A fake vLLM server.", allow_abbrev=False)
    parser.add_argument("--model", default="fake")
    parser.add_argument("--served-model-name", default="")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--max-loras", type=int, default=8)
    parser.add_argument("--runner", default="generate")
    parser.add_argument("--hf-overrides", type=json.loads, default={}, help="`is_matryoshka` lets requests choose their dimensions")
    parser.add_argument("--fake-token-ms", type=float, default=5.0, help="time of one step, in which every running sequence makes a token")
    parser.add_argument("--fake-accept-ms", type=float, default=0.0, help="time until a request is queued, as for reading a long prompt")
    parser.add_argument("--fake-start-ms", type=float, default=0.0, help="time until the port opens")
    parser.add_argument("--fake-poison", default="", help="a word in a request that the engine does not survive")
    parser.add_argument("--fake-truth", type=Path, default=None, help="a file that gets a line for each token; see lmaas.testing.truth")
    parser.add_argument("--otlp-traces-endpoint", default=None)
    given, _ = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO)
    log.info("%s: there is no model here to keep apart", ACTIVE_MARK)
    time.sleep(given.fake_start_ms / 1000)
    name = given.served_model_name or given.model
    engine = Engine(name, given.max_model_len, given.max_num_seqs, given.max_loras, given.fake_token_ms / 1000)
    if given.fake_truth is not None:
        engine.truth = TruthLog(given.fake_truth)
    matryoshka = bool(given.hf_overrides.get("is_matryoshka"))
    pooling = Pooling(engine, Refused, matryoshka=matryoshka) if given.runner == "pooling" else None
    app: ASGIApp = build(engine, given.fake_accept_ms / 1000, given.fake_poison.encode(), pooling)
    if given.otlp_traces_endpoint is not None:
        app = Traced(app, given.otlp_traces_endpoint)
    config = uvicorn.Config(
        app,
        host=given.host,
        port=given.port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=5,
    )
    Server(config, engine).run()


if __name__ == "__main__":
    main()
