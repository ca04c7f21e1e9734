"""Checks of everything that clients receive: responses against the OpenAPI document, streams against the rules of their protocol."""

import json
from collections.abc import Callable

from tests.integration.clients.tap import Exchange
from tests.integration.schemas import check_body


def check_exchange(exchange: Exchange) -> None:
    """Fail unless a response is as the gateway documents it."""
    if exchange.streamed:
        if exchange.ended:
            CHECKS[exchange.path](exchange.received)
    elif exchange.headers.get("content-type", "").startswith("application/json"):
        check_body(exchange.method, exchange.path.partition("?")[0], exchange.status, json.loads(exchange.received))
        assert exchange.headers["x-request-id"]


def check_chunks(stream: bytes) -> None:
    """Fail unless a stream of chat completions or completions has one id, ends with `[DONE]` and finishes each choice once."""
    *events, end = _data(stream)
    assert end == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    finished = [choice["index"] for choice in choices if choice["finish_reason"]]
    assert sorted(finished) == sorted({choice["index"] for choice in choices})


def _data(stream: bytes) -> list[str]:
    lines = stream.decode().split("\n")
    assert lines[-2:] == ["", ""], "The last event does not end."
    assert all(line.startswith(("data: ", ":")) or not line for line in lines)
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


CHECKS: dict[str, Callable[[bytes], None]] = {"/v1/chat/completions": check_chunks, "/v1/completions": check_chunks}
