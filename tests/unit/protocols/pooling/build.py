"""Requests, models and engine answers for the tests of pooling protocols."""

import base64
import json
from array import array
from typing import Any

from lmaas.inference.catalog import ServedModel
from lmaas.inference.protocol import Inference, Protocol
from lmaas.inference.request import EngineRequest
from lmaas.protocols.pooling.requests import PoolingRequest
from lmaas.states import PoolKind
from lmaas.store.models import BaseModel


def base_model(slots: int = 16, context: int = 256) -> BaseModel:
    """Return a base model that embeds."""
    return BaseModel("bm", "base", "folder", "float32", {}, 8, 8, 8, slots, context, 2**28, "", PoolKind.EMBED)


def inference_of(protocol: Protocol[Any], body: dict[str, Any], model: BaseModel | None = None) -> Inference[Any]:
    """Return a request on its way, checked for the model."""
    found = Inference("req_1", protocol, protocol.read({"model": "asked"} | body))
    base = base_model() if model is None else model
    found.request.check(base)
    found.model = ServedModel(base, "internal", "", "", None, 0)
    return found


def sent(request: EngineRequest, part: int = 0) -> dict[str, Any]:
    """Return the engine's body for a part."""
    body: dict[str, Any] = json.loads(request.body("internal", "salt", part))
    assert (body.pop("model"), body.pop("cache_salt")) == ("internal", "salt")
    return body


def vector(text: object) -> list[float]:
    """Return a vector that shows which input it belongs to. Its numbers are exact in 32 bits."""
    return [float(len(str(text))), float(sum(map(ord, str(text)))) / 64]


def embedded(body: dict[str, Any], **changes: Any) -> bytes:
    """Return vLLM's response to a body of `/v1/embeddings`."""
    plain = [vector(each) for each in body["input"]]
    as_text = body.get("encoding_format") == "base64"
    shown = [base64.b64encode(array("f", each).tobytes()).decode() if as_text else each for each in plain]
    data = [{"index": index, "object": "embedding", "embedding": each} for index, each in enumerate(shown)]
    tokens = sum(len(str(each)) for each in body["input"])
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}
    answer = {"id": "embd-req_1", "object": "list", "created": 1, "model": "internal", "data": data, "usage": usage}
    return json.dumps(answer | changes, separators=(",", ":")).encode()


def scored(body: dict[str, Any]) -> bytes:
    """Return vLLM's response to a body of `/score`: a score is the length of the second side, and its sign that of the first."""
    first = body["text_1"] * (len(body["text_2"]) if len(body["text_1"]) == 1 else 1)
    data = [
        {"index": index, "object": "score", "score": len(each) / 8 * (-1 if sign.startswith("-") else 1)}
        for index, (sign, each) in enumerate(zip(first, body["text_2"], strict=True))
    ]
    usage = {"prompt_tokens": 10, "total_tokens": 10, "completion_tokens": 0, "prompt_tokens_details": None}
    return json.dumps({"id": "score-req_1", "object": "list", "created": 1, "model": "internal", "data": data, "usage": usage}).encode()


def parts_of(request: PoolingRequest) -> list[dict[str, Any]]:
    """Return the engine's body for each part."""
    return [sent(request, part) for part in range(request.parts)]
