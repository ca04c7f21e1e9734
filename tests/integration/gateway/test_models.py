"""The models of a tenant in both shapes, and the header that names the model that served."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from anthropic import AsyncAnthropic, NotFoundError
from openai import AsyncOpenAI

from lmaas.states import PoolKind
from lmaas.store.models import BaseModel, put_base_model
from tests.integration.gateway.stack import CHAT, Stack, Tenant, running

HI: list[Any] = [{"role": "user", "content": "Hi"}]


@dataclass(frozen=True)
class Service:
    """A stack with a base model that has a replica, one without, one that embeds, and a tenant with an adapter in two versions."""

    stack: Stack
    tenant: Tenant


@pytest.fixture(scope="module")
async def service(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        base = await stack.model("base")
        await put_base_model(stack.db, BaseModel("", "embedder", "no-model", "float32", {}, 16, 8, 8, 16, 512, 2**28, "", PoolKind.EMBED))
        tenant = await stack.tenant()
        for _ in range(2):
            await stack.adapter(tenant, "robot", base)
        await stack.replica(base)
        yield Service(stack, tenant)


async def test_openais_client_lists_models_with_their_kinds(service: Service) -> None:
    async with AsyncOpenAI(base_url=f"{service.stack.url}/v1", api_key=service.tenant.key, max_retries=0) as client:
        models = [model.model_dump() async for model in client.models.list()]
        assert {(model["id"], model["parent"], model["kind"]) for model in models} == {
            ("base", None, "generate"),
            ("embedder", None, "embed"),
            ("robot", "base", "generate"),
        }
        assert (await client.models.retrieve("robot@1")).model_dump()["kind"] == "generate"


async def test_base_models_are_listed_alone(service: Service) -> None:
    async with service.stack.client(service.tenant) as http:
        found = (await http.get("/v1/models?adapters=false")).json()["data"]
        assert [(model["id"], model["parent"]) for model in found] == [("base", None), ("embedder", None)]
        assert len((await http.get("/v1/models?adapters=true")).json()["data"]) == 3
        for refused in ("", "no", "False"):
            response = await http.get(f"/v1/models?adapters={refused}")
            assert (response.status_code, response.json()["error"]["param"]) == (400, "adapters")


async def test_anthropics_client_lists_models_page_by_page(service: Service) -> None:
    async with AsyncAnthropic(base_url=service.stack.url, api_key=service.tenant.key, max_retries=0) as client:
        first = await client.models.list(limit=2)
        assert [model.id for model in first.data] == ["base", "embedder"]
        assert (first.has_more, first.first_id, first.last_id) == (True, "base", "embedder")
        assert [model.id async for model in client.models.list(limit=1)] == ["base", "embedder", "robot"]
        back = await client.models.list(limit=1, before_id="robot")
        assert ([model.id for model in back.data], back.has_more) == (["embedder"], True)
        model = await client.models.retrieve("robot@1")
        assert (model.id, model.type, model.display_name, model.max_input_tokens) == ("robot@1", "model", "robot@1", 2048)
        with pytest.raises(NotFoundError) as caught:
            await client.models.retrieve("robot@3")
        body: Any = caught.value.body
        assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")


async def test_errors_and_heads_in_anthropics_shape(service: Service) -> None:
    headers = {"anthropic-version": "2023-06-01"}
    async with service.stack.client(service.tenant) as http, service.stack.client() as keyless:
        refused = await http.get("/v1/models?limit=0", headers=headers)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "limit")
        assert refused.json()["type"] == "error"
        unknown = await keyless.get("/v1/models", headers=headers)
        assert (unknown.status_code, unknown.json()["error"]["type"]) == (401, "authentication_error")
        for path in ("/v1/models", "/v1/models/robot"):
            head, got = await http.head(path, headers=headers), await http.get(path, headers=headers)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-length"] == str(len(got.content))


@pytest.mark.parametrize(("name", "shown"), [("base", "base"), ("robot", "robot@2"), ("robot@1", "robot@1")])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HI, "max_tokens": 2}),
        (CHAT, {"messages": HI, "max_tokens": 2, "stream": True}),
        ("/v1/messages", {"messages": HI, "max_tokens": 2, "stream": True}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 2, "stream": True}),
    ],
)
async def test_an_answer_names_the_model_that_served(service: Service, name: str, shown: str, path: str, body: dict[str, Any]) -> None:
    async with service.stack.client(service.tenant) as http:
        answer = await http.post(path, json=body | {"model": name})
    assert (answer.status_code, answer.headers.get_list("x-lmaas-model")) == (200, [shown])


async def test_a_request_that_no_model_served_names_none(service: Service) -> None:
    async with service.stack.client(service.tenant) as http:
        refused = await http.post(CHAT, json={"model": "robot@9", "messages": HI})
        assert (refused.status_code, "x-lmaas-model" in refused.headers) == (404, False)
