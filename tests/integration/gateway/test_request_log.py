"""A gateway logs one line for each request, whatever its outcome, and no text of a tenant."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from lmaas.inference.observers import Observers
from lmaas.inference.request_log import RequestLog
from lmaas.store.models import BaseModel
from lmaas.store.tenants import update_tenant
from tests.integration.gateway.stack import CHAT, COMPLETION, Stack, Tenant, running
from tests.support.conditions import until

SECRET = "the-secret-word"


@dataclass
class Logged:
    """A gateway whose request log the test can read, and a tenant with an adapter."""

    stack: Stack
    url: str
    tenant: Tenant
    #: A model without an engine.
    cold: BaseModel
    written: list[str] = field(default_factory=list)

    async def line(self, request_id: str) -> dict[str, Any]:
        """Return the line of a request, which must be its only one."""
        await until(lambda: any(request_id in line for line in self.written))
        found = [json.loads(line) for line in self.written if request_id in line]
        assert len(found) == 1
        line: dict[str, Any] = found[0]
        return line

    async def ask(self, method: str, path: str, key: str | None = None, **more: Any) -> dict[str, Any]:
        """Send a request, and return its line."""
        headers = {"authorization": f"Bearer {key or self.tenant.key}"} | more.pop("headers", {})
        async with httpx.AsyncClient(base_url=self.url) as http:
            response = await http.request(method, path, headers=headers, **more)
        line = await self.line(response.headers["x-request-id"])
        assert line["status"] == response.status_code
        return line


@pytest.fixture(scope="module")
async def logged(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Logged]:
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        base, tenant = await stack.model("base"), await stack.tenant()
        cold = await stack.model("cold")
        await stack.adapter(tenant, "robot", base)
        await stack.replica(base)
        written: list[str] = []
        async with stack.gateway(Observers(RequestLog(written.append)), queue_deadline_s=1.5) as gateway:
            yield Logged(stack, gateway.url, tenant, cold, written)
        assert SECRET not in "".join(written)
        assert tenant.key not in "".join(written)


def chat(model: str = "robot", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": f"Hi {SECRET}"}], "max_tokens": 4} | more


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat()),
        (COMPLETION, {"model": "robot", "prompt": SECRET, "max_tokens": 4}),
        ("/v1/messages", chat()),
        ("/v1/responses", {"model": "robot", "input": SECRET, "max_output_tokens": 4}),
    ],
)
async def test_answers_of_every_protocol(logged: Logged, path: str, body: dict[str, Any], stream: bool) -> None:
    line = await logged.ask("POST", path, json=body | {"stream": stream})
    expected = {
        "tenant_id": logged.tenant.id,
        "key_id": logged.tenant.key_id,
        "method": "POST",
        "path": path,
        "outcome": "completed",
        "code": None,
        "model": "robot@1",
        "base_model": "base",
        "stream": stream,
        "completion_tokens": 4,
    }
    assert expected.items() <= line.items()
    assert line["prompt_tokens"] > 0
    assert line["replica_id"].startswith("rep_")
    assert (line["ttft_ms"] is not None) is stream
    assert line["took_ms"] + 5 >= line["run_ms"] + line["queue_ms"] >= 0


async def test_requests_that_no_engine_served(logged: Logged) -> None:
    shown = ("status", "outcome", "code", "path")
    line = await logged.ask("POST", CHAT, json=chat("nope"))
    assert tuple(line[name] for name in shown) == (404, "refused", "model_not_found", CHAT)
    assert "model" not in line
    line = await logged.ask("POST", CHAT, "sk-wrong", json=chat())
    assert tuple(line[name] for name in (*shown, "tenant_id")) == (401, "refused", "invalid_api_key", CHAT, None)
    line = await logged.ask("POST", CHAT, json=chat(temperature=9))
    assert (line["status"], line["outcome"], line["key_id"]) == (400, "refused", logged.tenant.key_id)
    line = await logged.ask("POST", CHAT, content=f"no json {SECRET}")
    assert tuple(line[name] for name in shown) == (400, "refused", "invalid_json", CHAT)
    line = await logged.ask("GET", f"/v1/models?q={SECRET}")
    assert tuple(line[name] for name in (*shown, "tenant_id")) == (200, "ok", None, "/v1/models", logged.tenant.id)
    line = await logged.ask("GET", "/v1/files/file-1")
    assert tuple(line[name] for name in shown) == (404, "refused", "file_not_found", "/v1/files/file-1")
    line = await logged.ask("GET", "/admin/v1/tenants")
    assert tuple(line[name] for name in shown)[:2] == (403, "refused")
    assert line["key_id"] == logged.tenant.key_id
    line = await logged.ask("GET", "/nothing/here")
    assert tuple(line[name] for name in shown) == (404, "refused", "not_found", "/nothing/here")
    line = await logged.ask("POST", "/v1/tokenize", json=chat())
    assert tuple(line[name] for name in (*shown, "tenant_id"))[0::4] == (line["status"], logged.tenant.id)


async def test_a_request_that_found_no_engine(logged: Logged) -> None:
    line = await logged.ask("POST", CHAT, json=chat("cold"))
    assert (line["status"], line["outcome"], line["code"], line["model"]) == (503, "expired", "no_capacity", "cold")
    assert line["queue_ms"] >= 1000
    assert (line["replica_id"], line["run_ms"], line["ttft_ms"]) == (None, None, None)


async def test_a_request_over_a_limit_has_its_model(logged: Logged) -> None:
    tenant = await logged.stack.tenant()
    await update_tenant(logged.stack.db, tenant.id, {"requests_per_minute": 1})
    assert (await logged.ask("POST", CHAT, tenant.key, json=chat("base")))["outcome"] == "completed"
    line = await logged.ask("POST", CHAT, tenant.key, json=chat("base"))
    assert (line["status"], line["outcome"], line["code"], line["model"]) == (429, "refused", "rate_limit_exceeded", "base")
    assert "prompt_tokens" not in line


async def test_a_client_that_leaves(logged: Logged) -> None:
    async with httpx.AsyncClient(base_url=logged.url, headers=logged.tenant.headers) as http:
        asking = asyncio.create_task(http.post(CHAT, json=chat("cold")))
        before = len(logged.written)

        async def waits() -> bool:
            return bool((await logged.stack.scheduler.stats(logged.cold.id))["queued"])

        await until(waits)
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
    await until(lambda: len(logged.written) > before)
    line = json.loads(logged.written[-1])
    assert (line["status"], line["outcome"], line["model"]) == (None, "aborted", "cold")


async def test_requests_that_do_not_reach_the_application(logged: Logged) -> None:
    host, _, port = logged.url.removeprefix("http://").partition(":")
    for sent, status, code in (
        (f"no http {SECRET}\r\n\r\n".encode(), 400, "invalid_http"),
        (b"GET /long HTTP/1.1\r\nx: " + b"y" * 70_000, 431, "headers_too_large"),
    ):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        head = (await reader.read()).decode()
        writer.close()
        request_id = next(line.partition(": ")[2] for line in head.splitlines() if line.startswith("x-request-id"))
        line = await logged.line(request_id)
        assert (line["status"], line["outcome"], line["code"], line["tenant_id"]) == (status, "refused", code, None)


async def test_probes_and_scrapes_are_not_logged(logged: Logged) -> None:
    before = len(logged.written)
    async with httpx.AsyncClient(base_url=logged.url) as http:
        for path in ("/healthz", "/health", "/readyz", "/metrics"):
            assert (await http.get(path)).status_code == 200
    assert len(logged.written) == before
