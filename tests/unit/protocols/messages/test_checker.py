"""The checker of streams notices each broken rule."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.anthropic_stream import check_stream
from tests.unit.protocols.messages.build import THINKING, TOOL, call, engine_stream, stream_of

Events = list[dict[str, Any]]
GOOD = check_stream(
    stream_of([engine_stream([{"reasoning": "Hm"}, {"content": "Hi"}, call(0, "f", '{"a":1}')], "tool_calls")], tools=[TOOL], **THINKING)
).events


def written(events: Events) -> str:
    return "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)


def places(kind: str) -> list[int]:
    return [number for number, event in enumerate(GOOD) if event["type"] == kind]


STARTS, DELTAS, STOPS = places("content_block_start"), places("content_block_delta"), places("content_block_stop")


def without(*numbers: int) -> Callable[[Events], Events]:
    return lambda events: [event for number, event in enumerate(events) if number not in numbers]


def doubled(number: int) -> Callable[[Events], Events]:
    return lambda events: [*events[: number + 1], *events[number:]]


def changed(number: int, **more: Any) -> Callable[[Events], Events]:
    return lambda events: [*events[:number], events[number] | more, *events[number + 1 :]]


def test_a_good_stream_passes() -> None:
    assert check_stream(written(GOOD)).events == GOOD
    check_stream(written(GOOD[:4]), ends=False)


BROKEN = {
    "no start": without(0),
    "two starts": doubled(0),
    "no first block": without(STARTS[0], DELTAS[0], DELTAS[1], STOPS[0]),
    "a block does not start": without(STARTS[1]),
    "a block does not stop": without(STOPS[1]),
    "a block stops twice": doubled(STOPS[1]),
    "an empty block": without(DELTAS[2]),
    "no signature": without(DELTAS[1]),
    "a delta after the signature": doubled(DELTAS[1]),
    "another block's delta": changed(DELTAS[2], index=0),
    "a number is left out": changed(STARTS[1], index=2),
    "a delta of another type": changed(DELTAS[2], delta={"type": "thinking_delta", "thinking": "x"}),
    "an empty delta": changed(DELTAS[2], delta={"type": "text_delta", "text": ""}),
    "a block starts with text": changed(STARTS[1], content_block={"type": "text", "text": "x"}),
    "a foreign tool id": changed(STARTS[2], content_block={"type": "tool_use", "id": "call_1", "name": "f", "input": {}}),
    "input that is not JSON": changed(DELTAS[3], delta={"type": "input_json_delta", "partial_json": "{"}),
    "no message_delta": without(len(GOOD) - 2),
    "two message_delta": doubled(len(GOOD) - 2),
    "no message_stop": without(len(GOOD) - 1),
    "two message_stop": doubled(len(GOOD) - 1),
    "an unknown stop reason": changed(len(GOOD) - 2, delta={"stop_reason": "stop", "stop_sequence": None}),
    "a stop sequence without its reason": changed(len(GOOD) - 2, delta={"stop_reason": "end_turn", "stop_sequence": "x"}),
    "the prompt grows": changed(len(GOOD) - 2, usage=GOOD[-2]["usage"] | {"cache_read_input_tokens": 1}),
    "fewer tokens than none": changed(len(GOOD) - 2, usage=GOOD[-2]["usage"] | {"output_tokens": -1}),
}


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_stream_is_noticed(spoil: Callable[[Events], Events]) -> None:
    with pytest.raises(AssertionError):
        check_stream(written(spoil(GOOD)))


@pytest.mark.parametrize(
    "stream",
    [
        'event: ping\ndata: {"type": "ping"}\n',
        "event: ping\n\n",
        ": waits\n\n" + written(GOOD),
        'event: pong\ndata: {"type": "ping"}\n\n' + written(GOOD),
        'data: {"type": "ping"}\n\n' + written(GOOD),
        "id: 7\n" + written(GOOD),
        written(GOOD) + "data: [DONE]\n\n",
        'event: error\ndata: {"type":"error","error":{"type":"server_error","message":"x"},"request_id":"req_1"}\n\n',
    ],
)
def test_broken_bytes_are_noticed(stream: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check_stream(stream)
