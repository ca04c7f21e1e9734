"""Checks event streams of the Responses API: their order and numbers, the identity of ids, and that the events add up to the response."""

import json
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]
TERMINAL = {"response.completed": "completed", "response.incomplete": "incomplete", "response.failed": "failed"}
#: The event for a piece, that for the whole text, and the field of the item or the part that has the text.
TEXTS = {
    "response.output_text": ("text", "output_text"),
    "response.refusal": ("refusal", "refusal"),
    "response.reasoning_text": ("text", "reasoning_text"),
}
ARGUMENTS = {
    "response.function_call_arguments": ("arguments", "function_call"),
    "response.custom_tool_call_input": ("input", "custom_tool_call"),
}
#: The first part of the ids of each kind of item.
PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_", "custom_tool_call": "ctc_"}


@dataclass
class ResponseStream:
    """A stream that has passed the check."""

    events: list[Event]
    comments: list[str]
    #: The response of the last event.
    response: dict[str, Any]

    @property
    def kinds(self) -> list[str]:
        """The types of the events."""
        return [event["type"] for event in self.events]

    @property
    def text(self) -> str:
        """The text of all messages."""
        items = self.response["output"]
        return "".join(part["text"] for item in items if item["type"] == "message" for part in item["content"])

    def pieces(self, kind: str) -> list[str]:
        """The pieces in events of a type."""
        return [event["delta"] for event in self.events if event["type"] == kind]


@dataclass
class _Item:
    begun: dict[str, Any]
    parts: list[dict[str, Any]] = field(default_factory=list)
    #: The text and the log probabilities of each part so far, and whether the part is done.
    texts: list[str] = field(default_factory=list)
    logprobs: list[list[Any]] = field(default_factory=list)
    told: list[bool] = field(default_factory=list)
    done_parts: int = 0
    done: dict[str, Any] | None = None


def parse(stream: bytes) -> tuple[list[Event], list[str]]:
    """Return the events and the comments. Each event has the lines `event` and `data` in this order, and the same type in both."""
    assert stream.endswith(b"\n\n"), "the stream ends in the middle of an event"
    events, comments = [], []
    for block in stream.decode().split("\n\n")[:-1]:
        lines = []
        for line in block.split("\n"):
            if line.startswith(":"):
                comments.append(line.removeprefix(":").strip())
            else:
                lines.append(line)
        assert len(lines) == 2, lines
        assert lines[0].startswith("event: "), lines
        assert lines[1].startswith("data: "), lines
        event = json.loads(lines[1].removeprefix("data: "))
        assert event["type"] == lines[0].removeprefix("event: ")
        events.append(event)
    return events, comments


def check(stream: bytes, *, background: bool = False, restarted_at: int = 0) -> ResponseStream:
    """Check a whole stream. Raises AssertionError.

    One of a response in the background begins with a queued response. `restarted_at` is the number of the first event of its last run, if
    an earlier run had events: these are left out.
    """
    events, comments = parse(stream)
    numbers = list(range(len(events)))
    if restarted_at:
        numbers = [0, 1, *range(restarted_at, restarted_at + len(events) - 2)]
    assert [event["sequence_number"] for event in events] == numbers
    if background:
        assert [event["type"] for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
        queued = events.pop(0)["response"]
        assert queued["status"] == "queued"
        assert queued["background"] is True
        assert events[0]["response"] == queued
        events[0] = events[0] | {"type": "response.created", "response": queued | {"status": "in_progress"}}
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] in TERMINAL, events[-1]["type"]
    first = events[0]["response"]
    assert first["status"] == "in_progress"
    assert first["id"].startswith("resp_")
    assert (first["output"], first["usage"], first["error"], first["incomplete_details"]) == ([], None, None, None)
    assert events[1]["response"] == first
    items: list[_Item] = []
    for event in events[2:-1]:
        _take(items, event)
    _check_end(items, first, events[-1])
    return ResponseStream(events, comments, events[-1]["response"])


def _take(items: list[_Item], event: Event) -> None:
    kind, index = event["type"], event["output_index"]
    if kind == "response.output_item.added":
        assert index == len(items)
        item = event["item"]
        assert item["id"].startswith(PREFIXES[item["type"]])
        assert item["status"] == "in_progress"
        assert item.get("content", []) == []
        assert item.get("arguments", "") == item.get("input", "") == ""
        assert item["id"] not in [other.begun["id"] for other in items]
        items.append(_Item(item))
        return
    found = items[index]
    assert found.done is None, "an event of an item that is done"
    if kind == "response.output_item.done":
        _check_done(found, event["item"])
        found.done = event["item"]
        return
    assert event["item_id"] == found.begun["id"]
    if kind in ("response.content_part.added", "response.content_part.done"):
        _take_part(found, event)
        return
    name, _, what = kind.rpartition(".")
    if name in ARGUMENTS:
        whole, of = ARGUMENTS[name]
        assert found.begun["type"] == of
        if not found.texts:
            _open(found)
        place = 0
    else:
        whole, of = TEXTS[name]
        place = event["content_index"]
        assert found.parts[place]["type"] == of
        assert place >= found.done_parts
    assert not found.told[place], "a piece after the whole text"
    if what == "delta":
        # A token may have no text, such as the first half of a character or the end of the completion.
        assert event["delta"] or event.get("logprobs"), "an empty piece"
        found.texts[place] += event["delta"]
        found.logprobs[place] += event.get("logprobs", [])
    else:
        assert what == "done"
        found.told[place] = True
        assert event[whole] == found.texts[place]
        assert event.get("logprobs", []) == found.logprobs[place]


def _open(item: _Item) -> None:
    item.texts.append("")
    item.logprobs.append([])
    item.told.append(False)


def _take_part(item: _Item, event: Event) -> None:
    part, place = event["part"], event["content_index"]
    field_name = "refusal" if part["type"] == "refusal" else "text"
    if event["type"] == "response.content_part.added":
        assert place == len(item.parts) == item.done_parts
        assert part[field_name] == ""
        item.parts.append(part)
        _open(item)
        return
    assert place == item.done_parts
    assert item.told[place], "a part ends before its text"
    assert part["type"] == item.parts[place]["type"]
    assert part[field_name] == item.texts[place]
    assert part.get("logprobs", []) == item.logprobs[place]
    item.parts[place] = part
    item.done_parts += 1


def _check_done(item: _Item, done: dict[str, Any]) -> None:
    same = ("id", "type", "role", "call_id", "name")
    assert {name: done.get(name) for name in same} == {name: item.begun.get(name) for name in same}
    assert done["status"] in ("completed", "incomplete")
    assert all(item.told), "an item ends before its text"
    if item.begun["type"] in ("message", "reasoning"):
        assert item.done_parts == len(item.parts)
        assert done["content"] == item.parts
    else:
        assert item.told == [True], "a call ends before its arguments"
        assert done[{of: whole for whole, of in ARGUMENTS.values()}[done["type"]]] == item.texts[0]
        assert done["call_id"].startswith("call_")


def _check_end(items: list[_Item], first: dict[str, Any], event: Event) -> None:
    response, status = event["response"], TERMINAL[event["type"]]
    assert response["status"] == status
    changed = ("status", "completed_at", "error", "incomplete_details", "output", "usage")
    assert {name: value for name, value in response.items() if name not in changed} == {
        name: value for name, value in first.items() if name not in changed
    }
    assert (response["error"] is None) is (status != "failed")
    assert (response["incomplete_details"] is None) is (status != "incomplete")
    assert (response["completed_at"] is None) is (status != "completed")
    done = [item.done for item in items if item.done is not None]
    if status == "failed":
        assert isinstance(response["error"]["code"], str)
        assert isinstance(response["error"]["message"], str)
        assert response["output"][: len(done)] == done
        assert [item["id"] for item in response["output"]] == [item.begun["id"] for item in items]
        return
    assert response["output"] == done
    assert len(done) == len(items), "an item is not done"
    assert response["usage"]["total_tokens"] == response["usage"]["input_tokens"] + response["usage"]["output_tokens"]
    states = [item["status"] for item in response["output"]]
    assert states[:-1] == ["completed"] * len(states[:-1])
    assert status == "incomplete" or states[-1:] == ["completed"]
    calls = [item["call_id"] for item in response["output"] if "call_id" in item]
    assert len(set(calls)) == len(calls)
