"""An engine that costs almost nothing, so that a proxy in front of it can be fully loaded: `python -m bench.gateways.engine`.

It implements the part of vLLM's HTTP API that gateways and supervisors use, and accepts vLLM's command line. Every answer has TOKENS
tokens and is written as vLLM writes it. A stream sends them one at a time: in each step, every running stream gets one event in a separate
write. Steps follow one another immediately, or at an interval (`POST /pace`). An embedding is always the same vector.
"""

import argparse
import asyncio
import base64
import json
import math
import struct
import sys
from collections.abc import Callable
from typing import Any

import uvloop

from lmaas.engine.cpu_lora.plugin import ACTIVE_MARK
from lmaas.testing.answer import Answer, compact
from lmaas.testing.generation import Sequence

TOKENS = 32
#: The JSON of each token.
TOKEN = b'" token"'
PROMPT_TOKENS = 48
#: The numbers of a vector, as many as those of all-MiniLM-L6-v2.
NUMBERS = [math.sin(number) / 20 for number in range(384)]
#: The JSON of the vector of every input, by encoding format.
VECTORS = {
    "base64": compact(base64.b64encode(struct.pack("<384f", *NUMBERS)).decode()),
    "float": compact(list(struct.unpack("<384f", struct.pack("<384f", *NUMBERS)))),
}


def _answer(model: str, *, chat: bool) -> tuple[Answer, Sequence]:
    """Return an answer as vLLM writes it, and its only choice, of which no token is generated yet."""
    pieces = (json.loads(TOKEN).encode(),) * TOKENS
    choice = Sequence(0, model, PROMPT_TOKENS, [], pieces, b"length", b"null", asyncio.Event())
    return Answer("chatcmpl-bench" if chat else "cmpl-bench", model, [[choice]], chat=chat), choice


def stream(model: str, *, chat: bool, include: bool, continuous: bool) -> list[bytes]:
    """Return the writes of one streamed answer in HTTP's chunks: its head and the first event, an event for each token, the end."""
    answer, choice = _answer(model, chat=chat)
    events: list[bytes] = []
    for choice.made in range(1, TOKENS + 1):
        choice.finish = b"length" if choice.made == TOKENS else None
        new = answer.chunks(continuous=include and continuous, usage=include).split(b"\n\n")[:-1]
        events += [event + b"\n\n" for event in new]
    writes = [b"%x\r\n%b\r\n" % (len(event), event) for event in events]
    last = (answer.last() if include else b"") + b"data: [DONE]\n\n"
    writes[0] = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n" + writes[0]
    writes[-1] += b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last)
    return writes


def whole(model: str, *, chat: bool) -> bytes:
    """Return an answer in one piece with its head."""
    written, choice = _answer(model, chat=chat)
    choice.made, choice.finish = TOKENS, b"length"
    return answer(written.whole())


def embeddings(model: str, inputs: int, form: str) -> bytes:
    """Return the vectors of this many inputs, with the answer's head."""
    tokens = PROMPT_TOKENS * inputs
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    usage_text = compact({**usage, "prompt_tokens_details": None, "completion_tokens_details": None})
    data = b",".join(b'{"index":%d,"object":"embedding","embedding":%b}' % (index, VECTORS[form]) for index in range(inputs))
    head = compact({"id": "embd-bench", "object": "list", "created": 1, "model": model})[:-1]
    return answer(head + b',"data":[%b],"usage":%b}' % (data, usage_text))


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
            model, options, chat = asked["model"], asked.get("stream_options") or {}, path.endswith(b"/chat/completions")
            engine.answered += 1
            if asked.get("stream"):
                key = {"include": bool(options.get("include_usage")), "continuous": bool(options.get("continuous_usage_stats"))}
                engine.start(self, engine.once((model, chat, *key.values()), lambda: stream(model, chat=chat, **key)))
                return
            self.write(engine.once((model, chat), lambda: whole(model, chat=chat)))
        elif path.endswith(b"/embeddings"):
            asked = json.loads(body)
            model, form = asked["model"], asked.get("encoding_format") or "float"
            inputs = len(asked["input"]) if isinstance(asked["input"], list) else 1
            engine.answered += 1
            self.write(engine.once((model, inputs, form), lambda: embeddings(model, inputs, form)))
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
