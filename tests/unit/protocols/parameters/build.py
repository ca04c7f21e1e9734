"""Short requests, and the results of reading them."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from lmaas.errors import InvalidRequest
from lmaas.inference.request import EngineRequest
from lmaas.protocols.parameters.request import TextRequest, read_chat, read_completion
from lmaas.store.models import BaseModel

USER = {"role": "user", "content": "Hello"}
CHAT: dict[str, Any] = {"model": "m", "messages": [USER]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "Hello"}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BOTH = pytest.mark.parametrize(("read", "body"), [(read_chat, CHAT), (read_completion, COMPLETION)], ids=["chat", "completion"])
Read = Callable[[dict[str, Any]], TextRequest]


def values(*given: Any) -> tuple[Any, ...]:
    """Return a strategy for values of any types."""
    return given


def each(name: str, code: str, *given: Any) -> list[tuple[str, Any, str]]:
    """Return cases of one parameter that end with the same code."""
    return [(name, value, code) for value in given]


def nested(depth: int) -> dict[str, Any]:
    """Return an object in an object in an object."""
    value: dict[str, Any] = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def schema(value: Any) -> dict[str, Any]:
    """Return a response format with a JSON schema."""
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}


def model(max_model_len: int) -> BaseModel:
    """Return a base model with this context."""
    return BaseModel("mod_1", "base", "no-model", "float32", {}, 16, 8, 8, 16, max_model_len, 2**28, "")


def refusal(read: Callable[[dict[str, Any]], object], body: dict[str, Any]) -> tuple[str, str | None]:
    """Return the code and the parameter of the error."""
    with pytest.raises(InvalidRequest) as caught:
        read(body)
    assert caught.value.status == 400
    assert len(caught.value.message) < 400
    assert caught.value.param is None or caught.value.param.split("[")[0].split(".")[0] in caught.value.message
    return caught.value.error_code, caught.value.param


def sent(request: EngineRequest) -> dict[str, Any]:
    """Return the engine's body, without the fields that every request has."""
    body: dict[str, Any] = json.loads(request.body("engine", "salt"))
    assert (body.pop("model"), body.pop("cache_salt"), body.pop("stream")) == ("engine", "salt", request.stream)
    body.pop("stream_options", None)
    return body


def chat(**changes: Any) -> dict[str, Any]:
    """Return the engine's body for a chat, without its messages."""
    body = sent(read_chat(CHAT | changes))
    body.pop("messages")
    return body


def completion(**changes: Any) -> dict[str, Any]:
    """Return the engine's body for a completion, without its prompt."""
    body = sent(read_completion(COMPLETION | changes))
    body.pop("prompt")
    return body
