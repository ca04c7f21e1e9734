"""The gateway's bars: which responses count as right, and which bytes as a command."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from bench.gateways import load, protocols
from bench.gateways.counted import Commands
from bench.gateways.engine import TOKEN, TOKENS, Connection, Engine
from bench.gateways.protocols import PROTOCOLS
from lmaas.testing.answer import compact


@asynccontextmanager
async def serving(engine: Engine) -> AsyncIterator[str]:
    server = await asyncio.get_running_loop().create_server(lambda: Connection(engine), "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/chat/completions"


@pytest.mark.parametrize("pace_s", [0, 0.001])
@pytest.mark.parametrize("body", [{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}])
async def test_the_engine_gives_what_the_load_asks_for(body: dict[str, Any], pace_s: float) -> None:
    engine = Engine("base")
    engine.pace_s = pace_s
    async with serving(engine) as url:
        result = await load.run({"url": url, "headers": {}, "body": {"model": "m"} | body, "connections": 4, "seconds": 0.05})
    assert result["requests"] == engine.answered >= 4


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name.startswith("embeddings")])
async def test_the_engine_embeds(name: str) -> None:
    engine = Engine("base")
    async with serving(engine) as chat:
        url = chat.replace(PROTOCOLS["chat"].path, PROTOCOLS[name].path)
        order = {"url": url, "headers": {}, "body": PROTOCOLS[name].body("m", stream=False), "connections": 2, "seconds": 0.05}
        result = await load.run(order | {"protocol": name})
        assert result["requests"] == engine.answered >= 2
        with pytest.raises(ValueError, match="0 of 32 tokens"):
            await load.run(order | {"protocol": "messages"})


def _streamed(kind: str, text: str) -> bytes:
    return f'event: {kind}\ndata: {{"type":"{kind}","delta":"{text}"}}\n\n'.encode()


_WORD = json.loads(TOKEN)
_WHOLE_TEXT = _streamed("response.output_text.done", _WORD * TOKENS)


@pytest.mark.parametrize(
    ("protocol", "right", "wrong"),
    [
        (
            "responses",
            _streamed("response.output_text.delta", _WORD * TOKENS) + _WHOLE_TEXT + _streamed("response.incomplete", _WORD * TOKENS),
            [
                _streamed("response.output_text.delta", _WORD * TOKENS) + _WHOLE_TEXT + _streamed("response.failed", ""),
                _streamed("response.output_text.delta", _WORD * TOKENS) + _WHOLE_TEXT,
                _streamed("response.output_text.delta", _WORD) + _WHOLE_TEXT + _streamed("response.incomplete", _WORD * TOKENS),
            ],
        ),
        (
            "messages",
            _streamed("content_block_delta", _WORD) * TOKENS + b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
            [
                _streamed("content_block_delta", _WORD) * TOKENS,
                _streamed("content_block_delta", _WORD) + b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
            ],
        ),
    ],
)
def test_what_is_a_whole_stream_of_another_protocol(protocol: str, right: bytes, wrong: list[bytes]) -> None:
    assert load.complaint(b"200", right, streamed=True, protocol=protocol) is None
    assert all(load.complaint(b"200", each, streamed=True, protocol=protocol) for each in wrong)


async def test_a_wrong_answer_is_an_error_and_not_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocols, "TOKENS", TOKENS + 1)
    async with serving(Engine("base")) as url:
        order = {"url": url, "headers": {}, "body": {"model": "m", "stream": True}, "connections": 1, "seconds": 0}
        with pytest.raises(ValueError, match=f"{TOKENS} of {TOKENS + 1} tokens"):
            await load.run(order)


@pytest.mark.parametrize(
    ("status", "content", "streamed"),
    [
        (b"503", TOKEN * TOKENS + b"data: [DONE]\n\n", True),
        (b"200", TOKEN * TOKENS, True),
        (b"200", TOKEN * (TOKENS - 1) + b"data: [DONE]\n\n", True),
        (b"200", compact({"error": "no"}), False),
    ],
)
def test_what_is_no_right_answer(status: bytes, content: bytes, streamed: bool) -> None:
    assert load.complaint(status, content, streamed=streamed)
    assert load.complaint(b"200", TOKEN * TOKENS + b"data: [DONE]\n\n", streamed=True) is None


def test_commands_are_found_however_their_bytes_arrive() -> None:
    sent = b"*1\r\n$4\r\nping\r\n*3\r\n$5\r\nFCALL\r\n$6\r\nsubmit\r\n$10\r\n*1\r\n$4\r\n\r\n\r\n*2\r\n$3\r\nGET\r\n$1\r\na\r\n"
    commands = Commands()
    assert [name for byte in sent for name in commands(bytes([byte]))] == ["PING", "FCALL submit", "GET"]
    assert Commands()(sent) == ["PING", "FCALL submit", "GET"]
    with pytest.raises(ValueError, match="not a command"):
        Commands()(b"GET a\r\n")
