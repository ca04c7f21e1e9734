"""The figures of a stream, from its lines and their times."""

import json

import pytest

from loadtest.stream import Stream


def event(content: str | None = None, usage: int | None = None) -> bytes:
    """Return a chunk as a service sends it."""
    choices = [] if usage is not None else [{"index": 0, "delta": {"role": "assistant"} if content is None else {"content": content}}]
    tokens = None if usage is None else {"prompt_tokens": 9, "completion_tokens": usage}
    return b"data: " + json.dumps({"choices": choices, "usage": tokens}).encode()


def read(*lines: tuple[float, bytes]) -> Stream:
    """Return a stream that was sent at 100 s and had these lines."""
    stream = Stream(sent_at=100.0)
    for now, line in lines:
        stream.read(line, now)
    return stream


def test_the_first_token_is_the_first_with_text() -> None:
    stream = read(
        (100.5, b": queued position=1 estimated_wait_s=2"),
        (102.0, event()),
        (102.1, event("")),
        (103.0, event("Arr")),
        (103.0, b""),
        (103.25, event(" matey")),
        (104.0, event("!")),
        (104.5, event(usage=4)),
        (104.5, b"data: [DONE]"),
    )
    assert stream.ttft_s == 3.0
    assert stream.gaps_s == [0.25, 0.75]
    # Four tokens in three events: the engine's count is right.
    assert (stream.tokens, stream.tokens_per_s) == (4, 3.0)
    assert stream.done
    assert stream.error is None


def test_an_answer_without_text_has_no_figures() -> None:
    stream = read((101.0, event()), (101.0, event(usage=1)), (101.0, b"data: [DONE]"))
    assert (stream.ttft_s, stream.gaps_s, stream.tokens_per_s) == (None, [], None)
    assert stream.done


def test_one_token_tells_no_speed() -> None:
    assert read((101.0, event("Hi")), (101.0, event(usage=1))).tokens_per_s is None


def test_an_error_event_is_an_error_and_an_early_end_is_not_done() -> None:
    broken = {"error": {"message": "The engine failed.", "type": "server_error", "param": None, "code": "engine_failed"}}
    stream = read((101.0, event("Hi")), (102.0, b"data: " + json.dumps(broken).encode()))
    assert stream.error == "engine_failed: The engine failed."
    assert not stream.done


@pytest.mark.parametrize("line", [b"<html>", b"data: nonsense"])
def test_nonsense_is_no_stream(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"not a line|Expecting value"):
        read((101.0, line))
