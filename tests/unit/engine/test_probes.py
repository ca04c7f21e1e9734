"""The responses of an embedding engine that a supervisor accepts."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from lmaas.engine.client import EngineClient, EngineError, ProbeResult


def answer(vector: str) -> bytes:
    return b'{"data":[{"index":0,"embedding":%b}],"usage":{"prompt_tokens":1,"total_tokens":1}}' % vector.encode()


class Answers:
    """A replacement for the connection to an engine: one response for every request, which is recorded."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status, self.body = status, body
        self.asked: list[tuple[str, dict[str, Any], str]] = []

    def post(self, url: str, json: dict[str, Any], headers: dict[str, str], **_: Any) -> "Answers":
        self.asked.append((url, json, headers["x-request-id"]))
        return self

    async def read(self) -> bytes:
        return self.body

    async def __aenter__(self) -> "Answers":
        return self

    async def __aexit__(self, *_: object) -> None:
        """End the response."""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bytes], Answers]:
    def answering(status: int, body: bytes) -> Answers:
        answers = Answers(status, body)
        monkeypatch.setattr(EngineClient, "session", answers)
        return answers

    return answering


async def test_a_vector_is_a_proof(engine: Callable[[int, bytes], Answers]) -> None:
    answers = engine(200, answer("[0.5, -1e-3]"))
    assert await EngineClient().embed_token("http://e", "m", "probe_1", 1) == ProbeResult("probe_1", 1, 0, 0)
    assert answers.asked == [("http://e/v1/embeddings", {"model": "m", "input": [[1]]}, "probe_1")]


@pytest.mark.parametrize("vector", ["[]", "[NaN, 1.0]", "[1.0, Infinity]", "[1e999]"])
async def test_a_vector_without_a_meaning_is_none(engine: Callable[[int, bytes], Answers], vector: str) -> None:
    """float16 overflows like this in a model that was trained in a wider type."""
    engine(200, answer(vector))
    with pytest.raises(EngineError, match="not finite"):
        await EngineClient().embed_token("http://e", "m", "probe_1", 1)


async def test_an_error_is_none(engine: Callable[[int, bytes], Answers]) -> None:
    engine(500, json.dumps({"error": {"message": "dead"}}).encode())
    with pytest.raises(EngineError, match="500"):
        await EngineClient().embed_token("http://e", "m", "probe_1", 1)
