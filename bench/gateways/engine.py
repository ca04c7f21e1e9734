"""An engine that costs almost nothing, so that a proxy in front of it can be fully loaded: `python -m bench.gateways.engine`.

It implements the part of vLLM's HTTP API that gateways and supervisors use, and accepts vLLM's command line. Every answer has TOKENS
tokens. A stream sends them one at a time: in each step, every running stream gets one event in a separate write. Steps follow one another
immediately, or at an interval (`POST /pace`).
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import uvloop

from lmaas.engine.cpu_lora.plugin import ACTIVE_MARK

TOKENS = 32
#: The JSON of each token.
TOKEN = b'" token"'
PROMPT_TOKENS = 48
_USAGE = {"prompt_tokens": PROMPT_TOKENS, "total_tokens": PROMPT_TOKENS + TOKENS, "completion_tokens": TOKENS}


def compact(value: Any) -> bytes:
    """Return a value as JSON without spaces, as vLLM writes it."""
    return json.dumps(value, separators=(",", ":")).encode()


def _event(model: str, choices: list[Any], usage: dict[str, int] | None) -> bytes:
    fields = {"id": "chatcmpl-bench", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": choices}
    return b"data: " + compact(fields | ({"usage": usage} if usage else {})) + b"\n\n"


def stream(model: str, *, include: bool, continuous: bool) -> list[bytes]:
    """Return the writes of one streamed answer in HTTP's chunks: its head and the first event, an event for each token, the end."""

    def so_far(made: int) -> dict[str, int] | None:
        running = {"prompt_tokens": PROMPT_TOKENS, "total_tokens": PROMPT_TOKENS + made, "completion_tokens": made}
        return running if include and continuous else None

    def choice(delta: dict[str, str], finish: str | None = None) -> list[Any]:
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]

    events = [_event(model, choice({"role": "assistant", "content": ""}), so_far(0))]
    for made in range(1, TOKENS + 1):
        events.append(_event(model, choice({"content": json.loads(TOKEN)}, "length" if made == TOKENS else None), so_far(made)))
    writes = [b"%x\r\n%b\r\n" % (len(event), event) for event in events]
    last = (_event(model, [], _USAGE) if include else b"") + b"data: [DONE]\n\n"
    writes[0] = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n" + writes[0]
    writes[-1] += b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last)
    return writes


def whole(model: str, *, chat: bool) -> bytes:
    """Return a plain answer with its head."""
    text = json.loads(TOKEN) * TOKENS
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    choices = [{"index": 0, **said, "logprobs": None, "finish_reason": "length"}]
    kind = "chat.completion" if chat else "text_completion"
    return answer(compact({"id": "bench", "object": kind, "created": 1, "model": model, "choices": choices, "usage": _USAGE}))


def answer(body: bytes, status: bytes = b"200 OK", kind: bytes = b"application/json") -> bytes:
    """Return a response with its head."""
    return b"HTTP/1.1 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (status, kind, len(body), body)


class Engine:
    """The state of all connections: the running streams, their pace, and answers that are built once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.answered = 0
        self.pace_s = 0.0
        self._running: dict[Connection, list[bytes]] = {}
        self._stepping = False
        self._ready: dict[Any, Any] = {}

    def once(self, key: Any, write: Callable[[], Any]) -> Any:
        """Return the answer for `key`, which is built on first use."""
        if key not in self._ready:
            self._ready[key] = write()
        return self._ready[key]

    def start(self, connection: "Connection", writes: list[bytes]) -> None:
        """Start a stream."""
        self._running[connection] = writes[::-1]
        if not self._stepping:
            self._stepping = True
            self._later()

    def stop(self, connection: "Connection") -> None:
        """End the stream of a client that has disconnected."""
        self._running.pop(connection, None)

    def _later(self) -> None:
        loop = asyncio.get_running_loop()
        if self.pace_s:
            loop.call_later(self.pace_s, self._step)
        else:
            loop.call_soon(self._step)

    def _step(self) -> None:
        for connection, writes in list(self._running.items()):
            connection.write(writes.pop())
            if not writes:
                del self._running[connection]
        self._stepping = bool(self._running)
        if self._stepping:
            self._later()


class Connection(asyncio.Protocol):
    """A client's connection, which sends one request after the other."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._got = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Handle the opened connection."""
        self._transport = transport  # type: ignore[assignment]
        self.write = self._transport.write

    def connection_lost(self, error: Exception | None) -> None:
        """Handle the closed connection."""
        self._engine.stop(self)

    def data_received(self, data: bytes) -> None:
        """Handle the bytes of a request: its head with a content-length, then its body."""
        self._got += data
        while (end := self._got.find(b"\r\n\r\n")) >= 0:
            head = self._got[:end].lower()
            at = head.find(b"\r\ncontent-length:")
            size = int(head[at + 17 :].partition(b"\r\n")[0]) if at >= 0 else 0
            if len(self._got) < end + 4 + size:
                return
            body = self._got[end + 4 : end + 4 + size]
            path, self._got = self._got[:end].split(b" ", 2)[1], self._got[end + 4 + size :]
            self._answer(path, body)

    def _answer(self, path: bytes, body: bytes) -> None:
        engine = self._engine
        if path.endswith(b"/completions"):
            asked = json.loads(body)
            model, options = asked["model"], asked.get("stream_options") or {}
            engine.answered += 1
            if asked.get("stream"):
                include, continuous = bool(options.get("include_usage")), bool(options.get("continuous_usage_stats"))
                engine.start(self, engine.once((model, include, continuous), lambda: stream(model, include=include, continuous=continuous)))
                return
            chat = path.endswith(b"/chat/completions")
            self.write(engine.once((model, chat), lambda: whole(model, chat=chat)))
        elif path == b"/metrics":
            counters = b"vllm:prompt_tokens_total %d\nvllm:generation_tokens_total %d\n" % (
                engine.answered * PROMPT_TOKENS,
                engine.answered * TOKENS,
            )
            self.write(answer(counters, kind=b"text/plain"))
        elif path.endswith(b"/models"):
            self.write(answer(compact({"object": "list", "data": [{"id": engine.name, "object": "model", "owned_by": "bench"}]})))
        elif path == b"/pace":
            engine.pace_s = json.loads(body)["ms"] / 1000
            self.write(answer(b"{}"))
        else:
            self.write(answer(b"{}"))  # health checks, loading and unloading of adapters, aborts


async def serve(name: str, host: str, port: int) -> None:
    """Serve until stopped."""
    engine = Engine(name)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(engine), host, port, backlog=1024)
    async with server:
        await server.serve_forever()


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    given, _ = parser.parse_known_args()
    sys.stderr.write(f"{ACTIVE_MARK}: there is no model here to keep apart\n")
    uvloop.run(serve(given.served_model_name, given.host, given.port))


if __name__ == "__main__":
    main()
