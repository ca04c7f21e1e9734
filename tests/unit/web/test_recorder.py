"""What is copied of an answer, and when its end may go on."""

from typing import Any

import pytest
from starlette.types import Message

from lmaas.observability import GatewayMetrics
from lmaas.store.database import Database
from lmaas.store.idempotency import Answer
from lmaas.web.call import Call
from lmaas.web.idempotency import Idempotency, Recorder

EVENT, DONE = b'data: {"choices":[]}\n\n', b"data: [DONE]\n\n"
STREAM, JSON = b"text/event-stream; charset=utf-8", b"application/json"


class Client:
    """Writes down what reached the client, and `settle`'s answer between it."""

    def __init__(self, max_bytes: int = 1000) -> None:
        self.log: list[Any] = []
        self.recorder = Recorder(self._send, self._settle, max_bytes)

    async def _send(self, message: Message) -> None:
        self.log.append(message.get("body", message.get("status")))

    async def _settle(self, answer: Answer | None) -> None:
        self.log.append(answer)

    async def answer(self, kind: bytes, *parts: bytes, status: int = 200, end: bytes | None = b"", whole: bool = True) -> list[Any]:
        length = str(len(b"".join(parts) + (end or b"")) if whole else 1).encode()
        headers = [(b"content-type", kind), *([(b"content-length", length)] if kind == JSON else [])]
        await self.recorder({"type": "http.response.start", "status": status, "headers": headers})
        for part in parts:
            await self.recorder({"type": "http.response.body", "body": part, "more_body": True})
        if end is not None:
            await self.recorder({"type": "http.response.body", "body": end, "more_body": False})
        return self.log


def kept(kind: bytes, body: bytes | None, status: int = 200) -> Answer:
    return Answer(status, kind.decode(), body)


async def test_a_plain_answer_goes_on_when_it_is_kept() -> None:
    assert await Client().answer(JSON, b"{}") == [kept(JSON, b"{}"), 200, b"{}", b""]
    assert await Client().answer(JSON, end=b"{}", status=400) == [kept(JSON, b"{}", 400), 400, b"{}"]


async def test_a_plain_answer_of_another_length_is_not_kept() -> None:
    assert await Client().answer(JSON, b"{}", whole=False) == [None, 200, b"{}", b""]


@pytest.mark.parametrize("status", [404, 429, 500, 502, 503])
async def test_other_errors_are_not_kept(status: int) -> None:
    assert await Client().answer(JSON, end=b"{}", status=status) == [None, status, b"{}"]


@pytest.mark.parametrize(
    ("parts", "end", "before"),
    [
        ((EVENT, DONE), b"", [EVENT]),
        ((EVENT, EVENT + DONE), b"", [EVENT]),
        ((EVENT, DONE[:5], DONE[5:]), b"", [EVENT, DONE[:5]]),
        ((EVENT,), DONE, [EVENT]),
        ((b": queued\n\n", EVENT, DONE), b"", [b": queued\n\n", EVENT]),
    ],
)
async def test_a_streams_end_goes_on_when_it_is_kept(parts: tuple[bytes, ...], end: bytes, before: list[bytes]) -> None:
    log = await Client().answer(STREAM, *parts, end=end)
    whole = b"".join(parts) + end
    assert log[: len(before) + 2] == [200, *before, kept(STREAM, whole)]
    assert b"".join(log[1 : len(before) + 1] + log[len(before) + 2 :]) == whole


async def test_a_stream_without_its_end_is_not_kept() -> None:
    error = b'data: {"error":{}}\n\n'
    assert await Client().answer(STREAM, EVENT, end=error) == [200, EVENT, None, error]
    assert await Client().answer(STREAM, EVENT, DONE, end=error) == [200, EVENT, None, DONE, error]
    assert await Client().answer(STREAM, EVENT, DONE, end=None) == [200, EVENT]


async def test_what_is_too_large_is_passed_on_and_not_kept() -> None:
    parts = [EVENT] * 10 + [DONE]
    log = await Client(max_bytes=100).answer(STREAM, *parts)
    assert log == [200, *parts[:-1], kept(STREAM, None), DONE, b""]
    assert await Client(max_bytes=4).answer(JSON, b"12345") == [kept(JSON, None), 200, b"12345", b""]
    assert await Client(max_bytes=5).answer(JSON, b"12345") == [kept(JSON, b"12345"), 200, b"12345", b""]


async def test_nothing_follows_the_end() -> None:
    client = Client()
    before = list(await client.answer(JSON, b"{}"))
    await client.recorder({"type": "http.response.body", "body": b"late", "more_body": False})
    assert client.log == before


async def test_the_same_body_at_another_address_is_another_request(no_database: Database) -> None:
    async def unused(*_: Any) -> Any:
        pytest.fail("nothing is sent")

    call = Call({"headers": [(b"idempotency-key", b"k")], "request_id": "r"}, unused, unused)
    claims = [
        Idempotency(no_database, GatewayMetrics(), 1).wanted(call, "ten", path, body)
        for path, body in (("/a", b"b"), ("/c", b"b"), ("/a", b"b"))
    ]
    assert claims[0] == claims[2] != claims[1]
