"""Short requests, the engine's responses to them, and the client's."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lmaas.inference.catalog import ServedModel
from lmaas.inference.protocol import Inference
from lmaas.protocols.responses.answer import StreamedResponse, WholeResponse
from lmaas.protocols.responses.protocol import Responses
from lmaas.protocols.responses.request import ResponsesRequest, read_response
from lmaas.protocols.responses.state import Item, NewResponse
from lmaas.store.models import BaseModel
from tests.support.response_streams import ResponseStream, check

HEX = "0123456789abcdef01234567"
BODY: dict[str, Any] = {"model": "m", "input": "Hello"}
FUNCTION = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CUSTOM = {"type": "custom", "name": "apply_patch"}
TOOLS = [FUNCTION, CUSTOM]
#: Streams and whole responses of vLLM 0.32, exactly as it sent them.
VLLM = Path(__file__).parent / "vllm"


class NoState:
    """The state of a tenant that has stored nothing yet. It remembers new items."""

    def __init__(self, **items: Item) -> None:
        self.items, self.stored, self.context = items, list[NewResponse](), list[Item]()

    async def context_of(self, tenant_id: str, *, previous_response_id: str | None, conversation_id: str | None) -> list[Item]:
        """Return the context."""
        assert (previous_response_id is None) is not (conversation_id is None)
        return self.context

    async def items_of(self, tenant_id: str, ids: Iterable[str]) -> dict[str, Item]:
        """Return the existing items."""
        return {name: self.items[name] for name in ids if name in self.items}

    async def store(self, tenant_id: str, response: NewResponse) -> None:
        """Remember a response."""
        self.stored.append(response)


def inference(**body: Any) -> Inference[ResponsesRequest]:
    """Return a request that is being processed."""
    request = read_response(BODY | body)
    found = Inference(f"req_{HEX}", Responses(NoState()), request)
    base = BaseModel("mod_1", "m", "no-model", "float32", {}, 16, 8, 8, 16, 2048, 2**28, "")
    found.tenant_id, found.model = "ten_1", ServedModel(base, "m", "", "", None, 0)
    return found


def event(value: Any) -> bytes:
    """Return an event of the engine."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def chunk(delta: dict[str, Any], made: int = 1, finish: str | None = None, **more: Any) -> bytes:
    """Return a chunk of the engine's stream."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, "token_ids": None} | more
    usage = {"prompt_tokens": 7, "total_tokens": 7 + made, "completion_tokens": made, "completion_tokens_details": None}
    return event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], "usage": usage})


def calling(index: int, name: str | None = None, arguments: str = "") -> dict[str, Any]:
    """Return a delta with a part of a call."""
    function = {"arguments": arguments} if name is None else {"name": name, "arguments": arguments}
    begin = {} if name is None else {"id": f"chatcmpl-tool-{index}", "type": "function"}
    return {"tool_calls": [begin | {"index": index, "function": function}]}


def ending(made: int, **details: Any) -> bytes:
    """Return the end of the engine's stream: the whole usage, and the mark."""
    usage = {"prompt_tokens": 7, "total_tokens": 7 + made, "completion_tokens": made} | details
    last = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [], "usage": usage}
    return event(last) + b"data: [DONE]\n\n"


def stream(*deltas: dict[str, Any], finish: str = "stop", **details: Any) -> bytes:
    """Return the engine's stream for these deltas, one token each. The last one has the finish reason."""
    first = chunk({"role": "assistant", "content": ""}, 0)
    rest = [chunk(delta, made + 1, finish if made == len(deltas) - 1 else None) for made, delta in enumerate(deltas)]
    return first + b"".join(rest) + ending(len(deltas), **details)


def words(*texts: str) -> list[dict[str, Any]]:
    """Return deltas of text."""
    return [{"content": text} for text in texts]


def fed(engine: bytes, cuts: Iterable[int] = (), **body: Any) -> bytes:
    """Return the client's stream for the engine's, which arrives in pieces."""
    answer = StreamedResponse(inference(stream=True, **body))
    places = sorted({min(cut, len(engine)) for cut in cuts} | {0, len(engine)})
    out = [answer.feed(engine[start:end]) for start, end in itertools.pairwise(places)]
    assert answer.done
    assert answer.complete
    assert not answer.aborted
    return b"".join([*out, answer.close(), answer.end()])


def streamed(engine: bytes, cuts: Iterable[int] = (), **body: Any) -> ResponseStream:
    """Return the client's stream, checked."""
    return check(fed(engine, cuts, **body))


def whole(engine: bytes, **body: Any) -> dict[str, Any]:
    """Return the client's response for the engine's whole response."""
    answer = WholeResponse(inference(**body))
    answer.take(engine)
    response: dict[str, Any] = json.loads(answer.end())
    return response
