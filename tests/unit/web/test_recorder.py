"""The recorded copy of a response, and the time at which its end may be sent."""

from collections.abc import Mapping
from typing import Any

import pytest

from lmaas.inference.sink import Collected
from lmaas.observability import GatewayMetrics
from lmaas.store.database import Database
from lmaas.store.idempotency import Answer
from lmaas.web.call import Call
from lmaas.web.idempotency import Idempotency, Recorder

EVENT, END = b'data: {"choices":[]}\n\n', b"data: [DONE]\n\n"
STREAM, JSON = "text/event-stream; charset=utf-8", "application/json"


class Client(Collected):
    """A client that records what it receives, with the results of `settle` in between."""

    def __init__(self, max_bytes: int = 1000) -> None:
        super().__init__()
        self.log: list[Any] = []
        self.recorder = Recorder(self, self._settle, max_bytes)

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        if not self.started:
            self.log.append(status)
        await super().start(status, headers)

    async def write(self, chunk: bytes) -> None:
        self.log.append(chunk)

    async def finish(self, chunk: bytes = b"", *, complete: bool = True) -> None:
        await super().finish(chunk, complete=complete)
        self.log.append((chunk, complete))

    async def _settle(self, answer: Answer | None) -> None:
        self.log.append(answer)

    async def answer(self, kind: str, *parts: bytes, status: int = 200, complete: bool = True) -> list[Any]:
        await self.recorder.start(status, {"content-type": kind})
        for part in parts[:-1]:
            await self.recorder.write(part)
        await self.recorder.finish(parts[-1], complete=complete)
        return self.log


async def test_an_answers_end_goes_on_when_it_is_kept() -> None:
    assert await Client().answer(JSON, b"{}") == [200, Answer(200, JSON, b"{}"), (b"{}", True)]
    assert await Client().answer(JSON, b"{}", status=400) == [400, Answer(400, JSON, b"{}"), (b"{}", True)]
    stream = [b": queued\n", EVENT, EVENT + END]
    assert await Client().answer(STREAM, *stream) == [200, *stream[:2], Answer(200, STREAM, b"".join(stream)), (EVENT + END, True)]


@pytest.mark.parametrize("status", [404, 429, 500, 502, 503])
async def test_other_errors_are_not_kept(status: int) -> None:
    assert await Client().answer(JSON, b"{}", status=status) == [status, None, (b"{}", True)]


async def test_a_stream_that_ends_with_an_error_is_not_kept() -> None:
    error = b'data: {"error":{}}\n\n'
    assert await Client().answer(STREAM, EVENT, error, complete=False) == [200, EVENT, None, (error, False)]


async def test_what_is_too_large_is_passed_on_and_not_kept() -> None:
    parts = [EVENT] * 10 + [END]
    assert await Client(max_bytes=100).answer(STREAM, *parts) == [200, *parts[:-1], Answer(200, STREAM, None), (END, True)]
    assert await Client(max_bytes=4).answer(JSON, b"12345") == [200, Answer(200, JSON, None), (b"12345", True)]
    assert await Client(max_bytes=5).answer(JSON, b"12345") == [200, Answer(200, JSON, b"12345"), (b"12345", True)]


async def test_the_head_is_that_of_the_first_start() -> None:
    client = Client()
    await client.recorder.start(200, {"content-type": STREAM})
    assert await client.answer(JSON, END, status=500) == [200, Answer(200, STREAM, END), (END, True)]


async def test_nothing_follows_the_end() -> None:
    client = Client()
    before = list(await client.answer(JSON, b"{}"))
    await client.recorder.finish(b"late", complete=False)
    assert client.log == before


async def test_the_end_is_sent_even_if_it_cannot_be_kept() -> None:
    async def fail(_: Answer | None) -> None:
        raise OSError("no database")

    client = Client()
    recorder = Recorder(client, fail, 1000)
    await recorder.start(200, {"content-type": JSON})
    with pytest.raises(OSError, match="no database"):
        await recorder.finish(b"{}")
    assert client.log == [200, (b"{}", True)]


async def test_a_client_that_goes_is_noticed_through_the_recorder() -> None:
    client, left = Client(), []
    undo = client.recorder.on_gone(lambda: left.append("undone"))
    client.recorder.on_gone(lambda: left.append("left"))
    undo()
    client.leave()
    assert left == ["left"]
    assert client.recorder.gone.is_set()


async def test_the_same_body_at_another_address_is_another_request(no_database: Database) -> None:
    async def unused(*_: Any) -> Any:
        pytest.fail("nothing is sent")

    call = Call({"headers": [(b"idempotency-key", b"k")], "request_id": "r"}, unused, unused)
    claims = [
        Idempotency(no_database, GatewayMetrics(), 1).wanted(call, "ten", path, body)
        for path, body in (("/a", b"b"), ("/c", b"b"), ("/a", b"b"))
    ]
    assert claims[0] == claims[2] != claims[1]
