"""Streams of messages: the events for an engine's chunks, however they arrive."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmaas.errors import EngineFailed, Unavailable
from lmaas.protocols.messages.protocol import Messages
from tests.support.anthropic_stream import Replay, check_stream
from tests.unit.protocols.messages.build import (
    PROMPT_TOKENS,
    REQUEST_ID,
    THINKING,
    TOOL,
    Delta,
    answer,
    call,
    cut,
    engine_stream,
    stream_of,
)

TOOLS: dict[str, Any] = {"tools": [TOOL]}


@pytest.fixture(scope="module")
def replay() -> Iterator[Replay]:
    found = Replay()
    yield found
    found.close()


def said(*words: str) -> list[Delta]:
    return [{"content": word} for word in words]


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def used(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "name": name, "input": arguments}


def thought(value: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": value}


CASES = [
    pytest.param(said("Hel", "lo"), {}, [text("Hello")], id="text"),
    pytest.param(said("\n\n", "Hi"), {}, [text("\n\nHi")], id="text after white space"),
    pytest.param(said("\n"), {}, [text("\n")], id="white space alone"),
    pytest.param(said("", ""), {}, [], id="nothing"),
    pytest.param([call(0, "f", '{"a": 1}')], TOOLS, [used("f", a=1)], id="call"),
    pytest.param([call(0, "f"), call(0, arguments='{"a"'), call(0, arguments=": 12}")], TOOLS, [used("f", a=12)], id="call in pieces"),
    pytest.param([call(0, "f")], TOOLS, [used("f")], id="call without arguments"),
    pytest.param(
        [call(0, "f", '{"a"'), {"reasoning": "Hm."}, *said("So."), call(0, arguments=": 1}"), call(1, "f")],
        TOOLS | THINKING,
        [used("f", a=1), thought("Hm."), text("So."), used("f")],
        id="thoughts and text within a call",
    ),
    pytest.param([call(0, "f", " "), call(0, arguments='\n{"a":1}')], TOOLS, [used("f", a=1)], id="call with white space"),
    pytest.param(
        [call(0, "f", '"Par'), call(0, arguments='is"'), call(1, "g", "[1]"), call(2, "h", "{}")],
        TOOLS,
        [used("f", invalid_arguments='"Paris"'), used("g", invalid_arguments="[1]"), used("h")],
        id="arguments that are no object",
    ),
    pytest.param([*said("I call", " f."), call(0, "f", "{}")], TOOLS, [text("I call f."), used("f")], id="text and call"),
    pytest.param([*said("\n"), call(0, "f", "{}")], TOOLS, [used("f")], id="white space before a call"),
    pytest.param(
        [call(0, "f", '{"a":1}'), *said("\n"), call(1, "g"), call(1, arguments="{}")], TOOLS, [used("f", a=1), used("g")], id="calls"
    ),
    pytest.param(
        [{"tool_calls": [*call(0, "f", "{}")["tool_calls"], *call(1, "f", '{"a":2}')["tool_calls"]]}],
        TOOLS,
        [used("f"), used("f", a=2)],
        id="calls in one chunk",
    ),
    pytest.param(
        [call(0, "f", '{"a":'), *said(" and"), call(0, arguments="1}"), *said(" so"), call(1, "g", "{}")],
        TOOLS,
        [used("f", a=1), text(" and so"), used("g")],
        id="text within a call",
    ),
    pytest.param([call(0, "f", "{}"), *said("Done", ".")], TOOLS, [used("f"), text("Done.")], id="text after a call"),
    pytest.param(
        [{"reasoning": "Hm"}, {"reasoning": "."}, *said("\n\n", "Yes")], THINKING, [thought("Hm."), text("\n\nYes")], id="thinking"
    ),
    pytest.param([{"reasoning": "Hm", "content": "Yes"}], THINKING, [thought("Hm"), text("Yes")], id="thinking and text in one chunk"),
    pytest.param([{"reasoning": "Hm"}, call(0, "f", "{}")], THINKING | TOOLS, [thought("Hm"), used("f")], id="thinking and call"),
    pytest.param([{"reasoning": "Hm"}, *said("Yes")], {}, [text("Yes")], id="thinking that was not asked for"),
    pytest.param([{"reasoning": "Hm"}], {"thinking": {"type": "adaptive", "display": "omitted"}}, [], id="thinking that is omitted"),
    pytest.param([{}, *said("a"), {}, *said("b")], {}, [text("ab")], id="chunks without content"),
    pytest.param(said('"\\\n\u0000é😀\u2028'), {}, [text('"\\\n\u0000é😀\u2028')], id="characters that need escapes"),
    pytest.param(said("data: [DONE]\n\nevent: error\n\n"), {}, [text("data: [DONE]\n\nevent: error\n\n")], id="text like an event"),
]


def plain(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the content without ids and signatures."""
    return [{name: value for name, value in block.items() if name not in ("id", "signature", "citations")} for block in message["content"]]


@pytest.mark.parametrize(("deltas", "more", "content"), CASES)
def test_blocks(replay: Replay, deltas: list[Delta], more: dict[str, Any], content: list[dict[str, Any]]) -> None:
    stream = engine_stream(deltas, "tool_calls" if any(block["type"] == "tool_use" for block in content) else "stop")
    for chunks in (
        [stream],
        [event + b"\n\n" for event in stream.removesuffix(b"\n\n").split(b"\n\n")],
        [bytes([byte]) for byte in stream],
    ):
        given = stream_of(chunks, **more)
        checked = check_stream(given)
        assert plain(checked.message) == content
        assert replay.message(given) == checked.message


@given(st.sampled_from([case.values for case in CASES]), st.lists(st.integers(0, 4000), max_size=20))
def test_chunks_of_any_size(case: tuple[list[Delta], dict[str, Any], list[dict[str, Any]]], places: list[int]) -> None:
    deltas, more, content = case
    checked = check_stream(stream_of(cut(engine_stream(deltas), places), **more))
    assert plain(checked.message) == content


PIECES: st.SearchStrategy[Delta] = st.one_of(
    st.text(max_size=6).map(lambda value: {"content": value}), st.text(max_size=6).map(lambda value: {"reasoning": value}), st.just({})
)


@given(st.lists(PIECES, max_size=12), st.integers(0, 3), st.lists(st.integers(0, 6000), max_size=10))
def test_any_answer_passes_the_checker(pieces: list[Delta], calls: int, places: list[int]) -> None:
    deltas = [*pieces, *(call(number, "f", '{"a":1}') for number in range(calls))]
    checked = check_stream(stream_of(cut(engine_stream(deltas), places), **THINKING, **TOOLS))
    kinds = [block["type"] for block in checked.message["content"]]
    assert kinds.count("tool_use") == calls
    # White space next to another block is left out.
    assert "".join(checked.text.split()) == "".join("".join(piece.get("content", "") for piece in pieces).split())


def test_pieces_that_arrive_together_are_one_delta() -> None:
    stream = engine_stream(said("a", "b", "c"))
    together = check_stream(stream_of([stream])).events
    assert [event["delta"] for event in together if event["type"] == "content_block_delta"] == [{"type": "text_delta", "text": "abc"}]


def test_the_order_of_events() -> None:
    checked = check_stream(stream_of([engine_stream([*said("a"), call(0, "f", "{}")], "tool_calls")], **TOOLS))
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert checked.types == ["message_start", *block, *block, "message_delta", "message_stop"]


def test_the_first_chunk_starts_the_message() -> None:
    made = answer(stream=True)
    first, rest = engine_stream(said("a")).split(b"\n\n", 1)
    begun = check_stream(made.feed(first + b"\n\n"), ends=False)
    assert begun.message["usage"]["input_tokens"] == PROMPT_TOKENS
    assert begun.message["model"] == "robot"
    assert begun.message["id"] == REQUEST_ID.replace("req_", "msg_")
    assert not made.done
    made.feed(rest)
    assert made.done
    assert made.usage == {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 0}}


@pytest.mark.parametrize(
    ("deltas", "finish", "stop", "expected"),
    [
        (said("a"), "stop", None, ("end_turn", None)),
        (said("a"), "stop", 7, ("end_turn", None)),
        (said("a"), "stop", "END", ("stop_sequence", "END")),
        (said(*"a" * 100), "length", None, ("max_tokens", None)),
        (said("a"), "length", None, ("model_context_window_exceeded", None)),
        (said("a"), "content_filter", None, ("refusal", None)),
        ([call(0, "f", "{}")], "tool_calls", None, ("tool_use", None)),
        # vLLM's reason for a call of a function that was required.
        ([call(0, "f", "{}")], "stop", None, ("tool_use", None)),
        ([call(0, "f", '{"a": 1}')], "tool_calls", "}", ("tool_use", None)),
        ([call(0, "f", '{"a": "EN')], "tool_calls", "END", ("stop_sequence", "END")),
        ([call(0, "f", '{"a": ')], "length", None, ("model_context_window_exceeded", None)),
    ],
)
def test_stop_reasons(deltas: list[Delta], finish: str, stop: int | str | None, expected: tuple[str, str | None]) -> None:
    message = check_stream(stream_of([engine_stream(deltas, finish, stop)], **TOOLS)).message
    assert (message["stop_reason"], message["stop_sequence"]) == expected


def test_the_usage_tells_cached_tokens_apart() -> None:
    usage = check_stream(stream_of([engine_stream(said("a", "b"), cached=16, reasoning=1)])).message["usage"]
    assert usage == {
        "input_tokens": PROMPT_TOKENS - 16,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 16,
        "output_tokens": 2,
        "output_tokens_details": {"thinking_tokens": 1},
        "service_tier": "standard",
    }


def test_ids_are_those_of_the_request() -> None:
    stream = engine_stream([call(0, "f", "{}"), call(1, "f", "{}")], "tool_calls")
    first, second = (check_stream(stream_of([stream], **TOOLS)).message for _ in range(2))
    assert first == second
    assert len({block["id"] for block in first["content"]}) == 2


def test_a_stream_that_fails() -> None:
    made = answer(stream=True)
    begun = made.feed(engine_stream(said("a", "b"))[:500])
    checked = check_stream(begun + made.failed(EngineFailed("The engine failed. Retry.")))
    assert checked.error is not None
    assert (checked.error["type"], checked.error["code"]) == ("api_error", "engine_failed")


def test_a_stream_that_fails_before_its_start() -> None:
    checked = check_stream(Messages().waiting(["queued"]) + answer(stream=True).failed(Unavailable("No engine had room. Retry.")))
    assert checked.pings == 1
    assert checked.comments == ["queued"]
    assert checked.error is not None
    assert checked.error["type"] == "overloaded_error"


def test_waiting_clients_get_pings() -> None:
    checked = check_stream(Messages().waiting(["queued position=1", "busy"]) * 2 + stream_of([engine_stream(said("a"))]))
    assert checked.pings == 2
    assert checked.comments == ["queued position=1", "busy"] * 2
    assert checked.text == "a"


def test_an_error_event_of_the_engine() -> None:
    made = answer(stream=True)
    made.feed(b'data: {"error":{"message":"EngineCore encountered an issue","code":500}}\n\ndata: [DONE]\n\n')
    assert made.error == b'{"error":{"message":"EngineCore encountered an issue","code":500}}'
    assert not made.complete


def test_an_answer_that_the_engine_aborts() -> None:
    made = answer(stream=True)
    stream = engine_stream(said("a", "b"), "abort")
    checked = check_stream(made.feed(stream), ends=False)
    assert made.aborted
    assert "".join(event["delta"]["text"] for event in checked.events if event["type"] == "content_block_delta") == "a"
    assert made.usage is not None
    assert made.usage["completion_tokens"] == 2


@pytest.mark.parametrize(
    "bytes_of_no_engine",
    [
        b"hello\n\n",
        b"data: hello\n\n",
        b"data: []\n\n",
        b'data: {"choices":7}\n\n',
        b'data: {"choices":[{"delta":{"content":7}}]}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":"7"}}\n\n',
        b'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{}"}}]}}]}\n\n',
        engine_stream([call(1, "f", "{}"), call(0, "f", "{}")]),
        engine_stream([call(0, "f", "{}"), call(1, "f", "{}"), call(0, arguments="{}")]),
    ],
)
def test_bytes_that_are_no_answer(bytes_of_no_engine: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        answer(stream=True).feed(bytes_of_no_engine)


def test_an_event_of_endless_length() -> None:
    made = answer(stream=True)
    made.feed(b"data: " + b"x" * 9_000_000)
    with pytest.raises(ValueError, match="bytes"):
        made.feed(b"x")


def test_the_bytes_of_an_event() -> None:
    stream = stream_of([engine_stream(said("a"))])
    assert (
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"a"}}\n\n' in stream
    )
    assert json.loads(stream.split(b"data: ")[-1]) == {"type": "message_stop"}
