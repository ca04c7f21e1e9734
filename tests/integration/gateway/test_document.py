"""Responses of OpenAI's endpoints match the OpenAPI document. Other tests compare everything that their clients receive."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.integration.gateway.stack import CHAT, COMPLETION, Stack, running
from tests.integration.schemas import SPEC, described

CHAT_BODY = {"messages": [{"role": "user", "content": "Hi"}]}
COMPLETION_BODY = {"prompt": ["Hi", "Ho"]}


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


def errors(name: str, value: Any) -> list[str]:
    schema = {"$ref": f"#/components/schemas/{name}", "components": SPEC["components"]}
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(value)]


async def test_answers_and_streams(stack: Stack) -> None:
    model, acme = await stack.model("base"), await stack.tenant()
    await stack.replica(model)
    for path, body, chunk in ((CHAT, CHAT_BODY, "ChatCompletionChunk"), (COMPLETION, COMPLETION_BODY, "CompletionChunk")):
        asked = {"model": "base", "max_tokens": 4, "n": 2, "service_tier": "default", **body}
        async with stack.client(acme) as http:
            answer = await http.post(path, json=asked)
            assert answer.status_code == 200
            responses = SPEC["paths"][path]["post"]["responses"]
            for header, found in responses["200"]["headers"].items():
                if found.get("$ref"):
                    assert header in answer.headers
        got = await stack.stream(acme, path, asked | {"stream_options": {"include_usage": True}})
        assert got.done
        assert len(got.events) > 8
        for event in got.events:
            assert errors(chunk, event) == [], event
    async with stack.client(acme) as http:
        for path in ("/v1/models", "/v1/models/base", "/healthz", "/health", "/readyz", "/v1/models/none", "/nowhere"):
            assert (await http.get(path)).status_code in (200, 404)


def test_a_response_that_is_not_described_is_found() -> None:
    assert errors("ModelList", {"object": "list", "data": [], "more": 1})
    assert errors("Model", {"id": "x"})
    assert errors("ChatCompletionChunk", {"choices": []})
    assert described("GET", "/admin/v1/tenants/x/adapters/y/") == "/admin/v1/tenants/{tenant}/adapters/{name}"
    assert described("GET", "/admin/v1/usage/events") == "/admin/v1/usage/events"
    assert described("POST", "/v1/models") is None
