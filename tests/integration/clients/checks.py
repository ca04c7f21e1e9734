"""Checks of everything that clients receive: responses against the OpenAPI document, streams against the rules of their protocol."""

import enum
import functools
import json
from collections.abc import Callable
from typing import Any

import openresponses_types
from pydantic import BaseModel

from tests.integration.clients.tap import Exchange
from tests.integration.schemas import check_body
from tests.support.anthropic_stream import check_stream
from tests.support.response_streams import check as check_response_stream

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
#: Items and tools of OpenAI that the Open Responses specification lacks.
BEYOND = ("custom_tool_call", "custom", "namespace", "web_search", "reasoning_text")


def check_exchange(exchange: Exchange) -> None:
    """Fail unless the gateway documents the response."""
    path = exchange.path.partition("?")[0]
    if exchange.streamed:
        # A client may disconnect before the end.
        if exchange.ended:
            CHECKS[path](exchange.received)
    elif exchange.method != "HEAD" and exchange.headers.get("content-type", "").startswith("application/json"):
        body = json.loads(exchange.received)
        check_body(exchange.method, path, exchange.status, body)
        assert exchange.headers["x-request-id"]
        if body.get("object") == "response" and "deleted" not in body:
            check_open_response(body)


def check_chunks(stream: bytes) -> None:
    """Fail unless a stream of chat completions or completions has one id, ends with `[DONE]` and finishes each choice once."""
    lines = stream.decode().split("\n")
    assert lines[-2:] == ["", ""], "the last event does not end"
    assert all(line.startswith(("data: ", ":")) or not line for line in lines)
    *events, end = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert end == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    finished = [choice["index"] for choice in choices if choice["finish_reason"]]
    assert sorted(finished) == sorted({choice["index"] for choice in choices})


def check_response_events(stream: bytes) -> None:
    """Fail unless a stream follows the rules of the Responses API, with events of the Open Responses specification."""
    for event in check_response_stream(stream).events:
        if not _beyond(event):
            _events()[event["type"]].model_validate(event)


def check_open_response(response: dict[str, Any]) -> None:
    """Fail unless a response is one of the Open Responses specification."""
    if not _beyond(response):
        openresponses_types.ResponseResource.model_validate(response)


def _beyond(value: dict[str, Any]) -> bool:
    text = json.dumps(value)
    # The specification's type of a JSON schema in `text.format` allows only null, by mistake.
    return any(f'"type": "{kind}"' in text for kind in (*BEYOND, "json_schema"))


@functools.cache
def _events() -> dict[str, type[BaseModel]]:
    """Return the specification's types of events, by the value of their field `type`."""
    found: dict[str, type[BaseModel]] = {}
    for name, value in vars(openresponses_types).items():
        if name.endswith("StreamingEvent"):
            kinds: type[enum.StrEnum] = value.model_fields["type"].annotation
            found |= dict.fromkeys([str(kind) for kind in kinds], value)
    return found


CHECKS: dict[str, Callable[[bytes], object]] = {
    "/v1/chat/completions": check_chunks,
    "/v1/completions": check_chunks,
    RESPONSES: check_response_events,
    MESSAGES: check_stream,
}
