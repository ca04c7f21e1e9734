"""Responses that vLLM has written, as messages."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.anthropic_stream import Replay, check_message, check_stream
from tests.unit.protocols.messages.build import TOOL, stream_of, whole_of

#: vLLM itself differs: it returns a call that is cut off as text in a response in one piece, and not at all in a stream.
DIFFERENT = ("call_cut",)
ANSWERS = Path(__file__).parents[1] / "responses" / "vllm"


@pytest.fixture(scope="module")
def replay() -> Iterator[Replay]:
    found = Replay()
    yield found
    found.close()


@pytest.mark.parametrize("name", sorted(path.stem for path in ANSWERS.glob("*.sse")))
def test_a_stream_is_the_message_in_one_piece(replay: Replay, name: str) -> None:
    stream = (ANSWERS / f"{name}.sse").read_bytes()
    given = stream_of([event + b"\n\n" for event in stream.split(b"\n\n")], tools=[TOOL])
    checked = check_stream(given)
    whole = whole_of((ANSWERS / f"{name}.json").read_bytes(), tools=[TOOL])
    check_message(whole)
    if not any(isinstance(block.get("input"), str) for block in checked.message["content"]):
        assert replay.message(given) == checked.message
        assert name in DIFFERENT or checked.message["content"] == whole["content"]
    assert checked.message["stop_reason"] == whole["stop_reason"]


def test_there_are_answers() -> None:
    assert len(list(ANSWERS.glob("*.sse"))) == len(list(ANSWERS.glob("*.json"))) > 5
    assert all(json.loads(path.read_text())["object"] == "chat.completion" for path in ANSWERS.glob("*.json"))
