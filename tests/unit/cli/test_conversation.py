"""The lines of a streamed response, and the request for the next message."""

from typing import Any

import pytest

from lmaas.cli.chat import harmless
from lmaas.cli.conversation import Conversation, Ended, Event, Text, Timing, Tokens, Waiting, events, summary, waiting_words
from lmaas.errors import ApiError

HELLO = 'data: {"choices":[{"index":0,"delta":{"content":"Hello"},"finish_reason":null}]}'
STOP = 'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}'
USAGE = 'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":4}}}'
DONE = "data: [DONE]"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([DONE], []),
        ([": loading the adapter", HELLO, "", STOP, "", USAGE, "", DONE], None),
        (['data:{"choices":[{"delta":{"role":"assistant","content":""}}]}', 'data: {"choices":[{"delta":null}]}', DONE], []),
        (['data: {"usage":{}}', 'data: {"usage":{"prompt_tokens":1}}', DONE], [Tokens(1, 0, 0)]),
        ([HELLO, DONE, HELLO], [Text("Hello")]),
    ],
)
def test_lines_become_events(lines: list[str], expected: list[Event] | None) -> None:
    whole = [Waiting("Loading the adapter"), Text("Hello"), Ended("stop"), Tokens(9, 4, 2)]
    assert list(events(lines)) == (whole if expected is None else expected)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('data: {"error":{"message":"No engine had room.","code":"no_capacity"}}', "No engine had room."),
        ("data: <html>", "is not an event of an answer"),
        ("data: 5", "is not an event of an answer"),
        ("<html>", "The answer broke off."),
        ("", "The answer broke off."),
    ],
)
def test_an_error_after_the_beginning_is_raised(line: str, says: str) -> None:
    found: list[Event] = []
    with pytest.raises(ApiError, match=says):
        found.extend(events([HELLO, line]))


@pytest.mark.parametrize(
    ("comment", "words"),
    [
        ("queued position=3 estimated_wait_s=12", "In the queue, about 12 s, position 3"),
        ("queued position=1 estimated_wait_s=6 cold_start=yes", "Cold start: an engine starts, about 6 s, position 1"),
        (
            "queued position=2 estimated_wait_s=40 late_s=40 start=unknown cold_start=yes",
            "Cold start: an engine starts, about 40 s, position 2, 40 s later than usual "
            "(the first start of this model, so this is a guess)",
        ),
        ("queued position=2 estimated_wait_s=4 new=1", "In the queue, about 4 s, position 2"),
        ("queued: the queue does not report at present", "Queued: the queue does not report at present"),
        ("every machine is busy with other models", "Every machine is busy with other models"),
        ("", ""),
    ],
)
def test_a_wait_in_words(comment: str, words: str) -> None:
    assert waiting_words(comment) == words


def test_the_conversation_is_sent_with_each_message() -> None:
    talk = Conversation("bot", "Be brief.", {"max_tokens": 5, "temperature": None})
    talk.keep("Hi", "Hello")
    talk.keep("Stopped before the first token", "")
    body = talk.request("More")
    assert body == {
        "model": "bot",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 5,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "More"},
        ],
    }
    talk.reset()
    assert [message["role"] for message in talk.request("More")["messages"]] == ["system", "user"]


@pytest.mark.parametrize(
    ("timing", "tokens", "ended", "line"),
    [
        (Timing(0.0, 0.5, 2.5), Tokens(9, 0, 5), "stop", "9 + 5 tokens, first token 0.50 s, total 2.50 s, 2.0 tokens/s"),
        (Timing(0.0, 0.5, 0.5), Tokens(9, 8, 1), "length", "9 (8 cached) + 1 tokens, first token 0.50 s, total 0.50 s, token limit"),
        (Timing(0.0), None, None, ""),
        (Timing(0.0), Tokens(3, 0, 0), "content_filter", "3 + 0 tokens, ended: content_filter"),
    ],
)
def test_the_line_after_an_answer(timing: Timing, tokens: Tokens | None, ended: Any, line: str) -> None:
    assert summary(timing, tokens, ended) == line


def test_the_first_token_is_the_first() -> None:
    timing = Timing(1.0)
    timing.token(2.0)
    timing.token(3.0)
    assert (timing.first, timing.last) == (2.0, 3.0)


def test_a_model_cannot_change_the_terminal() -> None:
    assert harmless("a\x1b]0;title\x07b\x9b1m\tc\r\n👩‍💻é") == "a]0;titleb1m\tc\n👩‍💻é"
