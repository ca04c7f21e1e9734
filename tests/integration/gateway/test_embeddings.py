"""Embeddings, rankings and scores over HTTP: forms of input, batches, errors, fairness, lost engines and the ledger."""

import asyncio
import base64
import math
from array import array
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from langchain_openai import OpenAIEmbeddings
from openai import AsyncOpenAI
from pydantic import SecretStr

from lmaas.protocols.pooling.requests import MAX_INPUTS
from lmaas.states import PoolKind, UsageStatus
from lmaas.store.models import BaseModel
from lmaas.store.tenants import update_tenant
from tests.integration.gateway.stack import CHAT, Replica, Stack, Tenant, running
from tests.support.conditions import until

EMBEDDINGS, RERANK, SCORE = "/v1/embeddings", "/v1/rerank", "/v1/score"
SLOTS = 16
BODIES: dict[str, dict[str, Any]] = {
    EMBEDDINGS: {"model": "embedder", "input": ["one two", "three"]},
    RERANK: {"model": "embedder", "query": "three", "documents": ["one two", "three"]},
    SCORE: {"model": "embedder", "text_1": "three", "text_2": ["one two", "three"]},
}
PATHS = pytest.mark.parametrize("path", list(BODIES))
#: An input that exceeds the context of 256 tokens in fewer characters than an input of ordinary words that fits.
TOO_LONG = "a " * 300


@dataclass(frozen=True)
class Service:
    """A stack with two models that embed, of which one can shorten its vectors, and one that generates, for which no engine runs."""

    stack: Stack
    embedder: BaseModel
    replica: Replica

    async def post(self, tenant: Tenant, path: str, body: object, headers: dict[str, str] | None = None) -> httpx.Response:
        async with self.stack.client(tenant) as http:
            return await http.post(path, json=body, headers=headers)

    async def vectors(self, tenant: Tenant, given: Any, **more: Any) -> list[list[float]]:
        response = await self.post(tenant, EMBEDDINGS, {"model": "embedder", "input": given} | more)
        assert response.status_code == 200, response.text
        return [each["embedding"] for each in response.json()["data"]]


@pytest.fixture(scope="module")
async def service(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        embedder, shortening = [await embedding_model(stack, name) for name in ("embedder", "shortening")]
        await stack.model("generator")
        replica = await stack.replica(embedder, "--fake-token-ms 2")
        await stack.replica(shortening, """--fake-token-ms 2 --hf-overrides '{"is_matryoshka": true}'""")
        yield Service(stack, embedder, replica)


async def embedding_model(stack: Stack, name: str) -> BaseModel:
    return await stack.model(name, slots=SLOTS, context=256, kind=PoolKind.EMBED)


@pytest.fixture
async def tenant(service: Service) -> Tenant:
    return await service.stack.tenant()


def check_error(response: httpx.Response, status: int, code: str, param: str | None) -> str:
    """Check the shape of an error, and return its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert (error["code"], error["param"]) == (code, param)
    message: str = error["message"]
    return message


async def test_every_form_of_input(service: Service, tenant: Tenant) -> None:
    (hello,) = await service.vectors(tenant, "hello")
    assert len(hello) == 384
    assert abs(math.fsum(number * number for number in hello) - 1) < 1e-5
    assert await service.vectors(tenant, ["hello", "world", "hello"]) == [hello, *await service.vectors(tenant, "world"), hello]
    (ids,) = await service.vectors(tenant, [101, 7592, 102])
    assert await service.vectors(tenant, [[101, 102], [101, 7592, 102]]) == [*await service.vectors(tenant, [101, 102]), ids]
    texts = [f"text {number}" for number in range(40)]
    assert await service.vectors(tenant, texts) == [(await service.vectors(tenant, text))[0] for text in texts]


async def test_an_answer_has_nothing_of_the_engine(service: Service, tenant: Tenant) -> None:
    response = await service.post(tenant, EMBEDDINGS, BODIES[EMBEDDINGS] | {"user": "me"})
    answer = response.json()
    assert list(answer) == ["object", "data", "model", "usage"]
    assert (answer["object"], answer["model"], answer["usage"]) == ("list", "embedder", {"prompt_tokens": 7, "total_tokens": 7})
    assert [list(each) for each in answer["data"]] == [["object", "index", "embedding"]] * 2
    request_id = response.headers["x-request-id"]
    (event,) = await service.stack.ledger(service.embedder, tenant)
    assert (event.request_id, event.status, event.stream) == (request_id, UsageStatus.COMPLETED, False)
    assert (event.prompt_tokens, event.cached_tokens, event.completion_tokens) == (7, 0, 0)


async def test_openais_client_reads_2048_inputs_as_base64_and_as_numbers(service: Service, tenant: Tenant) -> None:
    before = await service.replica.counters()
    texts = [f"text number {number % 100}" for number in range(MAX_INPUTS)]
    async with AsyncOpenAI(base_url=f"{service.stack.url}/v1", api_key=tenant.key, max_retries=0) as client:
        decoded = await client.embeddings.create(model="embedder", input=texts)
        plain = await client.embeddings.create(model="embedder", input=texts, encoding_format="float")
        few = await client.embeddings.create(model="embedder", input=texts[:3])
    raw = await service.vectors(tenant, texts[:3], encoding_format="base64")
    assert len(decoded.data) == len(plain.data) == MAX_INPUTS
    assert [each.index for each in decoded.data] == list(range(MAX_INPUTS))
    as_floats = [array("f", each.embedding) for each in plain.data]
    assert [array("f", each.embedding) for each in decoded.data] == as_floats
    assert [array("f", each.embedding) for each in few.data] == as_floats[:3]
    assert [array("f", base64.b64decode(str(each))) for each in raw] == as_floats[:3]
    assert as_floats[0] == as_floats[100] != as_floats[1]
    assert decoded.usage.prompt_tokens == decoded.usage.total_tokens == plain.usage.prompt_tokens == 5 * MAX_INPUTS
    events = await service.stack.ledger(service.embedder, tenant)
    assert sum(event.prompt_tokens for event in events) == (await service.replica.counters())[0] - before[0] == 5 * (2 * MAX_INPUTS + 6)


async def test_langchain_embeds_documents_and_queries(service: Service, tenant: Tenant) -> None:
    # Without this setting, LangChain sends the token ids of OpenAI's tokenizer for every model.
    settings: dict[str, Any] = {"model": "embedder", "base_url": f"{service.stack.url}/v1", "check_embedding_ctx_length": False}
    async with httpx.AsyncClient() as http:
        model = OpenAIEmbeddings(**settings, api_key=SecretStr(tenant.key), http_async_client=http)
        found = await model.aembed_documents(["one two", "three"])
        assert await model.aembed_query("three") == found[1]
    assert found == [pytest.approx(each, abs=1e-7) for each in await service.vectors(tenant, ["one two", "three"])]


async def test_a_ranking(service: Service, tenant: Tenant) -> None:
    documents = [f"document {number}" for number in range(60)]
    body = {"model": "embedder", "query": documents[41], "documents": documents, "top_n": 2}
    answer = (await service.post(tenant, RERANK, body)).json()
    assert answer["id"].startswith("rerank-req_")
    best, second = answer["results"]
    assert best == {"index": 41, "relevance_score": pytest.approx(1, abs=1e-5), "document": {"text": documents[41]}}
    assert second["relevance_score"] < best["relevance_score"]
    score = (await service.post(tenant, SCORE, {"model": "embedder", "queries": documents[41], "documents": documents})).json()
    assert score["id"].startswith("score-req_")
    assert [each["index"] for each in score["data"]] == list(range(60))
    assert score["data"][second["index"]]["score"] == second["relevance_score"]
    # The query counts once for each of the four parts of at most 15 documents.
    assert score["usage"] == answer["usage"] == {"prompt_tokens": 4 * 64, "total_tokens": 4 * 64}


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"input": ""}, "empty_input", "input"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "too_many_inputs", "input"),
        ({"input": TOO_LONG}, "context_length_exceeded", "input"),
        ({"input": [5] * 257}, "context_length_exceeded", "input"),
        ({"input": " ", "add_special_tokens": False}, "empty_input", "input"),
        ({"input": "x", "dimensions": 64}, "unsupported_parameter", "dimensions"),
        ({"input": "x", "truncate_prompt_tokens": 257}, "out_of_range", "truncate_prompt_tokens"),
        ({"input": "x", "encoding_format": "bytes"}, "out_of_range", "encoding_format"),
        ({"input": "x", "unknown": 1}, "unsupported_parameter", "unknown"),
        ({"model": "nobody", "input": "x"}, "model_not_found", "model"),
    ],
)
async def test_what_is_refused_costs_nothing(service: Service, tenant: Tenant, body: dict[str, Any], code: str, param: str) -> None:
    before = await service.replica.counters()
    response = await service.post(tenant, EMBEDDINGS, {"model": "embedder"} | body)
    message = check_error(response, 404 if code == "model_not_found" else 400, code, param)
    assert service.embedder.id not in message
    if code == "context_length_exceeded":
        assert message.startswith("This model's maximum context length is 256 tokens. However, your prompt ")
    assert (await service.replica.counters())[0] == before[0]
    assert sum(event.charge_picousd + event.prompt_tokens for event in await service.stack.ledger(service.embedder, tenant)) == 0


async def test_a_request_of_which_a_later_part_is_refused_costs_nothing(service: Service, tenant: Tenant) -> None:
    body = {"model": "embedder", "input": ["considerably longer words " * 60] * 40 + [TOO_LONG]}
    check_error(await service.post(tenant, EMBEDDINGS, body), 400, "context_length_exceeded", "input")
    (event,) = await service.stack.ledger(service.embedder, tenant)
    assert (event.status, event.code, event.prompt_tokens) == (UsageStatus.FAILED, "context_length_exceeded", 0)


@pytest.mark.parametrize(
    "content",
    [
        b'{"model":"embedder","input":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"embedder","input":["' + b"a" * 50_000 + b'"',
        b'{"model":"embedder","input":[NaN]}',
        b'{"model":"embedder","input":[1e999]}',
        b'{"model":"embedder","input":[' + b"9" * 5000 + b"]}",
        b'{"model":"embedder","input":[[1,[2]]]}',
        b'{"model":"embedder","input":{"length":3,"0":"a"}}',
        b'{"model":["embedder"],"input":"x"}',
        b'["embedder"]',
        b'{"model":"embedder","input":"\xff"}',
    ],
)
async def test_hostile_input(service: Service, tenant: Tenant, content: bytes) -> None:
    async with service.stack.client(tenant) as http:
        response = await http.post(EMBEDDINGS, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_texts_of_any_kind_are_embedded(service: Service, tenant: Tenant) -> None:
    async with service.stack.client(tenant) as http:
        content = b'{"model":"embedder","input":["\\ud83d cut","\\u0000","data: [DONE]","\\"usage\\":{}}],\\"data\\":["]}'
        response = await http.post(EMBEDDINGS, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 200, response.text
    assert [each["index"] for each in response.json()["data"]] == [0, 1, 2, 3]


async def test_truncation(service: Service, tenant: Tenant) -> None:
    body = {"model": "embedder", "input": [TOO_LONG, "a b"], "truncate_prompt_tokens": -1}
    assert (await service.post(tenant, EMBEDDINGS, body)).json()["usage"]["prompt_tokens"] == 256 + 4
    assert await service.vectors(tenant, "a b c d", truncate_prompt_tokens=4) == await service.vectors(tenant, "a b")
    left = {"truncate_prompt_tokens": 4, "truncation_side": "left"}
    assert await service.vectors(tenant, "a b c d", **left) == await service.vectors(tenant, "c d")


async def test_dimensions(service: Service, tenant: Tenant) -> None:
    async def asked(dimensions: int) -> httpx.Response:
        return await service.post(tenant, EMBEDDINGS, {"model": "shortening", "input": "x", "dimensions": dimensions})

    assert len((await asked(64)).json()["data"][0]["embedding"]) == 64
    assert "range [1, 384]" in check_error(await asked(999), 400, "out_of_range", "dimensions")


@PATHS
async def test_a_model_that_generates_does_not_embed(service: Service, tenant: Tenant, path: str) -> None:
    response = await service.post(tenant, path, BODIES[path] | {"model": "generator"})
    assert check_error(response, 400, "unsupported_model", "model").startswith("The model 'generator' generates text")


async def test_a_model_that_embeds_does_not_generate(service: Service, tenant: Tenant) -> None:
    body = {"model": "embedder", "messages": [{"role": "user", "content": "x"}]}
    assert check_error(await service.post(tenant, CHAT, body), 400, "unsupported_model", "model").startswith("The model 'embedder' embeds")


@PATHS
async def test_a_repeated_request_runs_once(service: Service, tenant: Tenant, path: str) -> None:
    first, second = [await service.post(tenant, path, BODIES[path], {"idempotency-key": "k"}) for _ in range(2)]
    assert (first.status_code, first.content) == (200, second.content)
    assert second.headers["idempotency-replayed"] == "true"
    assert len(await service.stack.ledger(service.embedder, tenant)) == 1


@PATHS
async def test_limits_hold(service: Service, tenant: Tenant, path: str) -> None:
    await update_tenant(service.stack.db, tenant.id, {"requests_per_minute": 2})
    answers = [await service.post(tenant, path, BODIES[path]) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    check_error(answers[2], 429, "rate_limit_exceeded", None)
    assert answers[1].headers["x-ratelimit-remaining-requests"] == "0"


async def test_tokens_per_minute_are_those_of_the_inputs(service: Service, tenant: Tenant) -> None:
    await update_tenant(service.stack.db, tenant.id, {"tokens_per_minute": 100})
    assert (await service.post(tenant, EMBEDDINGS, {"model": "embedder", "input": [[7] * 30] * 3})).status_code == 200
    check_error(await service.post(tenant, EMBEDDINGS, {"model": "embedder", "input": [7] * 11}), 429, "rate_limit_exceeded", None)
    assert (await service.post(tenant, EMBEDDINGS, {"model": "embedder", "input": [7] * 10})).status_code == 200


@PATHS
async def test_metrics_name_the_path(service: Service, tenant: Tenant, path: str) -> None:
    assert (await service.post(tenant, path, BODIES[path])).status_code == 200
    async with service.stack.client() as http:
        text = (await http.get("/metrics")).text
    assert any(f'"{path}"' in line and "completed" in line for line in text.splitlines())


@dataclass(frozen=True)
class Slow:
    """A stack with a replica that embeds 16 inputs in 30 ms."""

    stack: Stack
    model: BaseModel
    replica: Replica

    async def post(self, tenant: Tenant, inputs: int) -> httpx.Response:
        async with self.stack.client(tenant) as http:
            return await http.post(EMBEDDINGS, json={"model": "embedder", "input": ["one two three"] * inputs})

    async def begun(self) -> None:
        """Wait until the replica has computed something for a tenant."""
        before = (await self.replica.counters())[0]

        async def more() -> bool:
            return (await self.replica.counters())[0] > before

        await until(more)


@pytest.fixture
async def slow(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Slow]:
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("slow")) as stack:
        model = await embedding_model(stack, "embedder")
        yield Slow(stack, model, await stack.replica(model, "--fake-token-ms 30"))


async def counters_equal_the_ledger(slow: Slow) -> None:
    """Check that the engine's counter equals the tokens of all events, including those of its probe."""
    await slow.stack.idle(slow.model)
    events = await slow.stack.ledger(slow.model)
    assert sum(event.prompt_tokens for event in events) == (await slow.replica.counters())[0]


async def test_large_batches_leave_others_their_turn_and_stop_when_their_clients_leave(slow: Slow) -> None:
    *large, small = [await slow.stack.tenant() for _ in range(4)]
    batches = [asyncio.create_task(slow.post(tenant, MAX_INPUTS)) for tenant in large]
    await slow.begun()
    answers = await asyncio.gather(*(slow.post(small, 1) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert not any(batch.done() for batch in batches), "others are served between their parts"
    for batch in batches:
        batch.cancel()
    await asyncio.gather(*batches, return_exceptions=True)
    await slow.stack.idle(slow.model)
    for tenant in large:
        (event,) = await slow.stack.ledger(slow.model, tenant)
        assert (event.status, event.completion_tokens) == (UsageStatus.ABORTED, 0)
        assert 0 < event.prompt_tokens < 5 * MAX_INPUTS
        assert event.prompt_tokens % (5 * SLOTS) == 0, "whole parts"
    await counters_equal_the_ledger(slow)


async def test_a_batch_is_computed_again_if_its_engine_dies(slow: Slow) -> None:
    tenant = await slow.stack.tenant()
    batch = asyncio.create_task(slow.post(tenant, 600))
    await slow.begun()
    slow.replica.kill()
    other = await slow.stack.replica(slow.model, "--fake-token-ms 2")
    answer = await batch
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["data"]) == 600
    assert answer.json()["usage"]["prompt_tokens"] == 5 * 600
    (event,) = await slow.stack.ledger(slow.model, tenant)
    assert (event.status, event.prompt_tokens, event.replica_id) == (UsageStatus.COMPLETED, 5 * 600, other.id)
    events = [event for event in await slow.stack.ledger(slow.model) if event.replica_id == other.id]
    assert sum(event.prompt_tokens for event in events) == (await other.counters())[0]


async def test_the_ledger_is_the_engines_counters_over_a_mix(slow: Slow) -> None:
    tenants = [await slow.stack.tenant() for _ in range(3)]

    async def one(number: int) -> None:
        path = list(BODIES)[number % 3]
        texts = [f"text {index} " * (1 + index % 5) for index in range(1 + number * 7 % 50)]
        asked: dict[str, dict[str, Any]] = {
            EMBEDDINGS: {"input": texts},
            RERANK: {"query": "q", "documents": texts},
            SCORE: {"queries": "q", "items": texts},
        }
        fields = asked[path]
        if number % 7 == 0:
            fields |= {"truncate_prompt_tokens": 999}
        async with slow.stack.client(tenants[number % 3]) as http:
            request = asyncio.create_task(http.post(path, json={"model": "embedder"} | fields))
            if number % 4 == 0:
                await asyncio.wait((request,), timeout=0.02 * (number % 9))
                request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            if not request.cancelled():
                assert request.result().status_code == (400 if number % 7 == 0 else 200), request.result().text

    await asyncio.gather(*(one(number) for number in range(40)))
    await counters_equal_the_ledger(slow)
