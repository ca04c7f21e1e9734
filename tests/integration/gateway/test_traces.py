"""A request has one trace, from the gateway through the queue to the engine, which contains no text of its tenant."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from lmaas.inference.observers import Observers
from lmaas.inference.request_traces import RequestTraces
from lmaas.store.models import BaseModel
from lmaas.tracing.context import OWN_PREFIX
from lmaas.tracing.export import span_writer
from tests.integration.gateway.stack import CHAT, Stack, Tenant, running
from tests.support.collector import Collector, Received, collector
from tests.support.conditions import until

SECRET = "the-secret-word"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
STAGES = {"admission", "queue", "delivery", "llm_request"}


@dataclass
class Traced:
    """A gateway and engines that send their traces to a collector, and a tenant with an adapter."""

    stack: Stack
    collected: Collector
    url: str
    tenant: Tenant
    base: BaseModel

    async def ask(self, body: dict[str, Any], path: str = CHAT, **headers: str) -> httpx.Response:
        """Send a request."""
        async with self.stack.client(self.tenant, self.url) as http:
            return await http.post(path, json=body, headers=headers)

    async def trace(self, trace_id: str, names: set[str]) -> dict[str, Received]:
        """Return the spans of a trace by name, once they have arrived."""
        await until(lambda: names <= self.collected.trace(trace_id).keys())
        return self.collected.trace(trace_id)


@pytest.fixture(scope="module")
async def traced(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Traced]:
    with collector() as collected:
        async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("stack"), traces_url=collected.url) as stack:
            base, tenant = await stack.model("base"), await stack.tenant()
            await stack.model("cold")
            await stack.adapter(tenant, "robot", base)
            await stack.replica(base)
            with span_writer(collected.url, "lmaas-gateway") as spans:
                observers = Observers(traces=RequestTraces(spans.add, 1.0))
                async with stack.gateway(observers, queue_deadline_s=1) as gateway:
                    yield Traced(stack, collected, gateway.url, tenant, base)
        assert SECRET.encode() not in collected.raw
        assert tenant.key.encode() not in collected.raw


def chat(model: str = "robot", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": f"Hi {SECRET}"}], "max_tokens": 4} | more


def trace_of(response: httpx.Response) -> str:
    return OWN_PREFIX + response.headers["x-request-id"].removeprefix("req_")


async def test_one_trace_through_gateway_queue_and_engine(traced: Traced) -> None:
    response = await traced.ask(chat(stream=True))
    found = await traced.trace(trace_of(response), STAGES | {f"POST {CHAT}"})
    root = found[f"POST {CHAT}"]
    # The first request of an adapter also waits until it is loaded.
    assert found.keys() - {"load"} == STAGES | {root.name}
    assert (root.service, root.kind, root.parent_id, root.failed) == ("lmaas-gateway", 2, "", False)
    assert {found[name].parent_id for name in ("admission", "queue", "delivery")} == {root.span_id}
    delivery, engine = found["delivery"], found["llm_request"]
    assert (engine.service, engine.parent_id) == ("lmaas-engine", delivery.span_id)
    assert (delivery.kind, delivery.events) == (3, ["first_token"])
    assert root.start_ns <= found["queue"].start_ns <= delivery.start_ns <= engine.start_ns
    assert engine.end_ns <= root.end_ns + 50_000_000
    expected = {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "lmaas",
        "gen_ai.request.model": "robot",
        "gen_ai.request.stream": True,
        "gen_ai.response.model": "robot@1",
        "gen_ai.usage.output_tokens": 4,
        "lmaas.request.id": response.headers["x-request-id"],
        "lmaas.tenant.id": traced.tenant.id,
        "lmaas.key.id": traced.tenant.key_id,
        "lmaas.outcome": "completed",
    }
    assert expected.items() <= root.attributes.items()
    assert root.attributes["gen_ai.usage.input_tokens"] > 0
    assert 0 < root.attributes["gen_ai.response.time_to_first_chunk"] < 10
    assert delivery.attributes["lmaas.replica.id"] == root.attributes["lmaas.replica.id"]


async def test_an_adapter_that_must_be_loaded(traced: Traced) -> None:
    await traced.stack.adapter(traced.tenant, "new", traced.base)
    response = await traced.ask(chat("new"))
    found = await traced.trace(trace_of(response), STAGES | {"load"})
    assert found["queue"].end_ns == found["load"].start_ns < found["load"].end_ns == found["delivery"].start_ns


async def test_a_clients_trace_is_continued(traced: Traced) -> None:
    response = await traced.ask(chat(), traceparent=f"00-{TRACE}-{SPAN}-01", tracestate="a=1")
    assert response.status_code == 200
    found = await traced.trace(TRACE, STAGES | {f"POST {CHAT}"})
    assert found[f"POST {CHAT}"].parent_id == SPAN
    assert found["llm_request"].parent_id == found["delivery"].span_id
    assert traced.collected.trace(trace_of(response)) == {}


async def test_a_trace_that_its_client_does_not_sample(traced: Traced) -> None:
    trace_id = TRACE.replace("0", "1")
    await traced.ask(chat(), traceparent=f"00-{trace_id}-{SPAN}-00")
    after = await traced.ask(chat())
    await traced.trace(trace_of(after), STAGES)
    assert traced.collected.trace(trace_id) == {}


async def test_requests_that_no_engine_served(traced: Traced) -> None:
    unknown = await traced.ask(chat(f"no-{SECRET}"))
    root = (await traced.trace(trace_of(unknown), {"admission"}))[f"POST {CHAT}"]
    assert (root.attributes["error.type"], root.failed, "gen_ai.request.model" in root.attributes) == ("model_not_found", False, False)
    invalid = await traced.ask(chat(temperature=9))
    found = await traced.trace(trace_of(invalid), {f"POST {CHAT}"})
    assert found[f"POST {CHAT}"].attributes["http.response.status_code"] == 400
    late = await traced.ask(chat("cold"))
    found = await traced.trace(trace_of(late), {"queue"})
    root = found[f"POST {CHAT}"]
    assert (root.failed, root.attributes["error.type"], root.attributes["lmaas.outcome"]) == (True, "no_capacity", "expired")
    assert (found["queue"].failed, "delivery" in found) == (True, False)
    assert found["queue"].end_ns - found["queue"].start_ns > 900_000_000


async def test_calls_of_the_management_api_and_of_models(traced: Traced) -> None:
    async with traced.stack.client(traced.tenant, traced.url) as http:
        usage = await http.get("/v1/usage")
        file = await http.get("/v1/files/file-1")
        for path in ("/healthz", "/metrics"):
            await http.get(path)
    assert (await traced.trace(trace_of(usage), {"GET /v1/usage"}))["GET /v1/usage"].attributes["lmaas.tenant.id"] == traced.tenant.id
    (span,) = (await traced.trace(trace_of(file), {"GET /v1/files/{file}"})).values()
    assert (span.attributes["url.path"], span.attributes["error.type"]) == ("/v1/files/file-1", "file_not_found")
    assert not any("health" in span.name or "metrics" in span.name for span in traced.collected.spans)


async def test_an_engine_that_is_lost_before_the_first_byte(traced: Traced) -> None:
    model = await traced.stack.model("lost")
    doomed = await traced.stack.replica(model, "--fake-accept-ms 20000")
    asked: asyncio.Task[httpx.Response] = asyncio.create_task(traced.ask(chat("lost")))

    async def begun() -> bool:
        return bool((await traced.stack.scheduler.stats(model.id))["load"])

    await until(begun)
    other = await traced.stack.replica(model)
    doomed.kill()
    response = await asked
    assert response.status_code == 200

    def spans(name: str) -> list[Received]:
        return [span for span in traced.collected.spans if span.trace_id == trace_of(response) and span.name == name]

    await until(lambda: len(spans("delivery")) == 2 and spans("llm_request"))
    first, second = spans("delivery")
    assert [(span.failed, span.attributes["lmaas.replica.id"]) for span in (first, second)] == [(True, doomed.id), (False, other.id)]
    assert [span.failed for span in spans("queue")] == [False, False]
    assert [span.parent_id for span in spans("llm_request")] == [second.span_id]


async def test_exemplars_lead_from_the_metrics_to_traces(traced: Traced) -> None:
    response = await traced.ask(chat(stream=True))
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    async with httpx.AsyncClient(base_url=traced.url) as http:
        detailed = await http.get("/metrics", headers=accept)
        plain = await http.get("/metrics")
    assert detailed.headers["content-type"].startswith("application/openmetrics-text")
    assert f'trace_id="{trace_of(response)}"' in detailed.text
    assert detailed.text.endswith("# EOF\n")
    assert "trace_id" not in plain.text
