"""Chats as vLLM writes them, and the messages that are made of them."""

import itertools
import json
from collections.abc import Iterable
from typing import Any

from lmaas.inference.protocol import Answer, Inference
from lmaas.protocols.messages.protocol import Messages

REQUEST_ID = "req_0123456789abcdef01234567"
USER = {"role": "user", "content": "Hello"}
BODY: dict[str, Any] = {"model": "robot", "max_tokens": 100, "messages": [USER]}
TOOL = {"name": "f", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
THINKING = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
PROMPT_TOKENS = 20

Delta = dict[str, Any]


def answer(*, stream: bool, **more: Any) -> Answer:
    """Return an empty response to a request."""
    protocol = Messages()
    request = protocol.read(BODY | {"stream": stream} | more)
    return protocol.answer(Inference(REQUEST_ID, protocol, request))


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def call(index: int, name: str | None = None, arguments: str = "") -> Delta:
    """Return a piece of a tool call. The first piece has the name."""
    function = {"arguments": arguments} | ({"name": name} if name else {})
    head = {"id": f"chatcmpl-tool-{index}", "type": "function"} if name else {}
    return {"tool_calls": [head | {"index": index, "function": function}]}


def engine_stream(
    deltas: Iterable[Delta],
    finish: str = "stop",
    stop: int | str | None = None,
    *,
    cached: int = 0,
    reasoning: int | None = None,
) -> bytes:
    """Return a stream with one token in each delta."""
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "engine-name"}
    details = None if reasoning is None else {"reasoning_tokens": reasoning}

    def usage(made: int) -> dict[str, Any]:
        counts = {"prompt_tokens": PROMPT_TOKENS, "total_tokens": PROMPT_TOKENS + made, "completion_tokens": made}
        return counts | {"completion_tokens_details": details}

    first: Delta = {"role": "assistant", "content": ""}
    given = list(deltas)
    out = [_event(head | {"choices": [{"index": 0, "delta": first, "logprobs": None, "finish_reason": None}], "usage": usage(0)})]
    for number, delta in enumerate(given, 1):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, "token_ids": None}
        if number == len(given):
            choice |= {"finish_reason": finish, "stop_reason": stop}
        out.append(_event(head | {"choices": [choice], "usage": usage(number)}))
    last = usage(len(given)) | {"prompt_tokens_details": {"cached_tokens": cached, "created_cache_tokens": 0}}
    out.append(_event(head | {"choices": [], "usage": last, "system_fingerprint": "vllm"}))
    return b"".join(out) + b"data: [DONE]\n\n"


def engine_whole(
    content: str | None,
    finish: str = "stop",
    stop: int | str | None = None,
    *,
    reasoning: str | None = None,
    calls: Iterable[tuple[str, str]] = (),
    made: int = 5,
    cached: int = 0,
) -> bytes:
    """Return a response in one piece."""
    message: dict[str, Any] = {"role": "assistant", "content": content, "reasoning": reasoning, "refusal": None}
    message["tool_calls"] = [
        {"id": f"chatcmpl-tool-{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls)
    ]
    choice = {"index": 0, "message": message, "finish_reason": finish, "stop_reason": stop}
    usage: dict[str, Any] = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": made, "total_tokens": PROMPT_TOKENS + made}
    usage["prompt_tokens_details"] = {"cached_tokens": cached, "created_cache_tokens": 0, "multimodal_tokens": None}
    return json.dumps(
        {"id": "chatcmpl-1", "object": "chat.completion", "model": "engine-name", "choices": [choice], "usage": usage}
    ).encode()


def stream_of(chunks: Iterable[bytes], **more: Any) -> bytes:
    """Return the client's stream for an engine's bytes."""
    made = answer(stream=True, **more)
    out = b"".join([*(made.feed(chunk) for chunk in chunks), made.close()])
    assert made.done
    assert made.complete
    return out + made.end()


def cut(text: bytes, places: Iterable[int]) -> list[bytes]:
    """Return the bytes in pieces that end at these places."""
    ends = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[start:end] for start, end in itertools.pairwise(ends)]


def whole_of(text: bytes, **more: Any) -> dict[str, Any]:
    """Return the client's message for an engine's response in one piece."""
    made = answer(stream=False, **more)
    made.take(text)
    assert made.complete
    message: dict[str, Any] = json.loads(made.end())
    return message
