"""Checks a stream of `/v1/messages`: the order of its events, their numbering, one open block, the usage, and what they add up to."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx2
from anthropic import Anthropic, DefaultHttpxClient

STOP_REASONS = ("end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal", "model_context_window_exceeded")
ERROR_TYPES = (
    "invalid_request_error",
    "authentication_error",
    "billing_error",
    "permission_error",
    "not_found_error",
    "conflict_error",
    "request_too_large",
    "rate_limit_error",
    "timeout_error",
    "api_error",
    "overloaded_error",
)
#: Each type of block with the fields of its start, and with the deltas that it may have: their type, their field, and the block's field.
_BLOCKS: dict[str, tuple[dict[str, Any], dict[str, tuple[str, str]]]] = {
    "text": ({"text": ""}, {"text_delta": ("text", "text")}),
    "thinking": (
        {"thinking": "", "signature": ""},
        {"thinking_delta": ("thinking", "thinking"), "signature_delta": ("signature", "signature")},
    ),
    "tool_use": ({"input": {}}, {"input_json_delta": ("partial_json", "input")}),
}


@dataclass
class Checked:
    """A stream that has passed the check: its events, the message that they add up to, and its error, if it ended with one."""

    events: list[dict[str, Any]] = field(default_factory=list)
    message: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    #: The comment lines, without their colon.
    comments: list[str] = field(default_factory=list)

    @property
    def types(self) -> list[str]:
        """The types of the events, without pings, and repeated deltas once."""
        found: list[str] = []
        for event in self.events:
            kind = event["type"]
            if kind != "ping" and (kind != "content_block_delta" or found[-1:] != [kind]):
                found.append(kind)
        return found

    @property
    def pings(self) -> int:
        """The number of pings."""
        return sum(event["type"] == "ping" for event in self.events)

    @property
    def text(self) -> str:
        """The text of the message."""
        return "".join(block["text"] for block in self.message.get("content", ()) if block["type"] == "text")


def check_stream(stream: bytes | str, *, ends: bool = True) -> Checked:
    """Return what a stream adds up to. Raises AssertionError with the rule that it breaks.

    With `ends` false the stream may stop anywhere, as one does whose connection is lost.
    """
    checked = Checked()
    events = list(_parsed(stream if isinstance(stream, str) else stream.decode(), checked.comments))
    checker = _Checker(checked)
    for name, data in events:
        event = json.loads(data)
        assert name == event["type"], f"the event {name!r} has the type {event['type']!r}"
        checked.events.append(event)
        checker.take(event)
    if ends:
        assert checker.ended, f"the stream stops after {[event['type'] for event in checked.events][-3:]}"
    return checked


def _parsed(text: str, comments: list[str]) -> Iterable[tuple[str, str]]:
    """Yield the name and the data of each event, as the standard of server-sent events reads them."""
    name, empty = "", True
    data: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        if not line:
            assert empty or data, "an event without data, which Go's clients take for an empty response"
            if data:
                yield name, "\n".join(data)
            name, data, empty = "", [], True
            continue
        empty = False
        if line.startswith(":"):
            comments.append(line[1:].strip())
            continue
        key, _, value = line.partition(": ")
        assert key in ("event", "data"), f"the line {line!r}"
        if key == "event":
            name = value
        else:
            data.append(value)
    assert (name, data) == ("", []), "the stream stops within an event"


class _Checker:
    def __init__(self, checked: Checked) -> None:
        self._checked = checked
        self._open: dict[str, Any] | None = None
        self._json = ""
        self._deltas: list[str] = []
        self._told_end = False
        self.ended = False

    def take(self, event: dict[str, Any]) -> None:
        assert not self.ended, f"{event['type']} after the end"
        kind = event["type"]
        if kind == "ping":
            assert event == {"type": "ping"}
            return
        if kind == "error":
            check_error(event)
            self._checked.error, self.ended = event["error"], True
            return
        if kind != "message_start":
            assert self._checked.message, f"{kind} before message_start"
        _TAKE[kind](self, event)

    def start(self, event: dict[str, Any]) -> None:
        assert not self._checked.message, "a second message_start"
        message = event["message"]
        told = (message["content"], message["stop_reason"], message["stop_sequence"])
        assert told == ([], None, None), f"the message starts with {told}"
        _check_head(message)
        self._checked.message = json.loads(json.dumps(message))

    def open(self, event: dict[str, Any]) -> None:
        assert self._open is None, "a block starts within another one"
        assert not self._told_end, "a block after message_delta"
        content = self._checked.message["content"]
        assert event["index"] == len(content), f"the block {event['index']} starts as number {len(content)}"
        block = dict(event["content_block"])
        fields, _ = _BLOCKS[block["type"]]
        assert {name: block[name] for name in fields} == fields, f"a {block['type']} block that does not start empty"
        if block["type"] == "tool_use":
            ids = [each["id"] for each in content if each["type"] == "tool_use"]
            assert block["id"].startswith("toolu_"), f"the tool call {block}"
            assert block["id"] not in ids, f"a second call {block['id']}"
            assert block["name"], f"the tool call {block}"
        self._open, self._json, self._deltas = block, "", []
        content.append(block)

    def delta(self, event: dict[str, Any]) -> None:
        block, delta = self._open, event["delta"]
        assert block is not None, "a delta without a block"
        assert event["index"] == len(self._checked.message["content"]) - 1, f"a delta for the block {event['index']}"
        _, deltas = _BLOCKS[block["type"]]
        assert delta["type"] in deltas, f"a {delta['type']} in a {block['type']} block"
        source, target = deltas[delta["type"]]
        assert delta[source], f"an empty {delta['type']}"
        assert self._deltas[-1:] != ["signature_delta"], "a delta after the signature"
        self._deltas.append(delta["type"])
        if delta["type"] == "input_json_delta":
            self._json += delta[source]
        else:
            block[target] += delta[source]

    def close(self, event: dict[str, Any]) -> None:
        block = self._open
        assert block is not None, "a stop without a block"
        assert event["index"] == len(self._checked.message["content"]) - 1, f"a stop of the block {event['index']}"
        if block["type"] == "tool_use" and self._json:
            try:
                block["input"] = json.loads(self._json)
            except ValueError:
                block["input"] = self._json  # allowed only in an interrupted response, which `tell_end` checks
        elif block["type"] != "tool_use":
            assert self._deltas, f"an empty {block['type']} block"
        if block["type"] == "thinking":
            assert block["signature"], "a thinking block without a signature"
        self._open = None

    def tell_end(self, event: dict[str, Any]) -> None:
        assert self._open is None, "message_delta within a block"
        assert not self._told_end, "a second message_delta"
        self._told_end = True
        message, before = self._checked.message, self._checked.message["usage"]
        message["stop_reason"], message["stop_sequence"] = event["delta"]["stop_reason"], event["delta"]["stop_sequence"]
        usage = event["usage"]
        assert _prompt(before | usage) == _prompt(before), f"the prompt changes from {before} to {usage}"
        assert usage["output_tokens"] >= before["output_tokens"], f"the usage falls from {before} to {usage}"
        message["usage"] = before | usage
        check_message(message)

    def stop(self, event: dict[str, Any]) -> None:
        assert event == {"type": "message_stop"}
        assert self._told_end, "message_stop without message_delta"
        self.ended = True


_TAKE: dict[str, Callable[[_Checker, dict[str, Any]], None]] = {
    "message_start": _Checker.start,
    "content_block_start": _Checker.open,
    "content_block_delta": _Checker.delta,
    "content_block_stop": _Checker.close,
    "message_delta": _Checker.tell_end,
    "message_stop": _Checker.stop,
}


def _check_head(message: dict[str, Any]) -> None:
    assert message["id"].startswith("msg_"), f"the message id {message['id']!r}"
    assert (message["type"], message["role"]) == ("message", "assistant")
    assert message["model"], "a message without a model"
    for name in ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"):
        assert message["usage"][name] >= 0, f"the usage {message['usage']}"


def _prompt(usage: dict[str, Any]) -> int:
    return int(usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"])


def check_message(message: dict[str, Any]) -> None:
    """Raise AssertionError unless this is a whole message, from a stream or from a response in one piece."""
    _check_head(message)
    reason = message["stop_reason"]
    assert reason in STOP_REASONS, f"the stop reason {reason!r}"
    assert (message["stop_sequence"] is not None) == (reason == "stop_sequence")
    kinds = [block["type"] for block in message["content"]]
    assert reason != "tool_use" or "tool_use" in kinds, "the stop reason tool_use without a call"
    for number, block in enumerate(message["content"]):
        if block["type"] == "tool_use" and not isinstance(block["input"], dict):
            cut = number == len(kinds) - 1 and reason in ("max_tokens", "stop_sequence", "model_context_window_exceeded")
            assert cut, f"the input {block['input']!r} is not an object"


def check_error(body: dict[str, Any]) -> None:
    """Raise AssertionError unless this is the body of an error, or an error event."""
    assert body["type"] == "error", f"the type {body['type']!r}"
    assert body["error"]["message"], "an error without a message"
    assert body["error"]["type"] in ERROR_TYPES, f"the error type {body['error']['type']!r}"
    assert body["request_id"].startswith("req_")


class Replay:
    """Reads streams with Anthropic's SDK, without a network."""

    def __init__(self) -> None:
        self._stream = b""
        self._client = Anthropic(
            api_key="k", base_url="http://replay", http_client=DefaultHttpxClient(transport=httpx2.MockTransport(self._respond))
        )

    def message(self, stream: bytes) -> dict[str, Any]:
        """Return the message that the SDK accumulates of a stream. Raises the SDK's error for one that ends with an error."""
        self._stream = stream
        with self._client.messages.stream(model="m", max_tokens=1, messages=[{"role": "user", "content": "x"}]) as events:
            found: dict[str, Any] = events.get_final_message().to_dict(mode="json", exclude_none=True)
            return found | {"stop_sequence": found.get("stop_sequence")}

    def close(self) -> None:
        """Close the client."""
        self._client.close()

    def _respond(self, _: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=self._stream)
