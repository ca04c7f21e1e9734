"""A real Prometheus scrapes a gateway, a controller and a job runner, and has data for every query of the dashboards and the alerts."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import yaml

from lmaas.control.background import BackgroundFigures
from lmaas.control.controller import Controller, PoolStatus
from lmaas.control.status import status_app
from lmaas.inference.observers import Observers
from lmaas.inference.request_traces import RequestTraces
from lmaas.jobs.metrics import JobMetrics
from lmaas.jobs.runner import Runner
from lmaas.jobs.status import serve_status
from lmaas.observability import GatewayMetrics
from lmaas.private_server import serve_privately
from lmaas.process import bound_command
from lmaas.states import Observed, UsageStatus
from lmaas.store.replicas import add_replica, observe
from lmaas.store.rights import DatabaseRole
from lmaas.store.usage import record_events
from lmaas.tracing.context import OWN_PREFIX
from tests.integration.gateway.stack import CHAT, Stack, Tenant, running
from tests.integration.store.build import usage_event
from tests.support.conditions import until
from tests.support.debian import program
from tests.support.processes import free_port
from tests.support.provisioners import Nowhere

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").exists())
DASHBOARDS = sorted((ROOT / "docker/grafana/dashboards").glob("*.json"))


def queries() -> dict[str, str]:
    """Every query of the dashboards by its panel's title."""
    found: dict[str, str] = {}
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                found[f"{path.stem}: {panel['title']}, {target['refId']}"] = target["expr"].replace("$tenant", "acme")
    return found


@asynccontextmanager
async def serving(stack: Stack, tmp_path: Path) -> AsyncIterator[tuple[dict[str, int], Tenant]]:
    """Run the processes' endpoints, and yield their ports by job, and a tenant."""
    base, tenant = await stack.model("base"), await stack.tenant()
    await stack.replica(base)
    await add_replica(stack.db, "rep_failed", base.id)
    await observe(stack.db, "rep_failed", Observed.FAILED)
    wasted = usage_event("w1", tenant.id, base_model="base", status=UsageStatus.WASTED, code="put_back", created_at=datetime.now(UTC))
    await record_events(stack.db, [wasted])
    controller = Controller(stack.settings, stack.database(DatabaseRole.CONTROLLER), stack.scheduler, Nowhere())  # type: ignore[arg-type]
    controller.active, controller.moved = True, 1
    figures = BackgroundFigures(900, 90_000, 3600, 5, 4, 2, 17, 350.5, 1)
    controller.statuses = {base.id: PoolStatus("base", 3, 2, 1, ("ready",), {"by": "zygote", "total_ms": 1500}, figures)}
    counted, jobs = GatewayMetrics(), JobMetrics()
    counted.registry.register(jobs)
    for event in ("attempted", "done"):
        jobs.line(event)
    jobs.response("completed")
    runner = Runner(stack.db, [], jobs.lost)
    ports = {"controller": free_port(), "jobs": free_port()}
    tasks = [
        asyncio.create_task(serve_privately(status_app(controller, stack.db, tmp_path), "127.0.0.1", ports["controller"])),
        asyncio.create_task(serve_status(runner, counted.registry, "127.0.0.1", ports["jobs"])),
    ]
    traces = RequestTraces(lambda _: None, 1.0)
    try:
        async with stack.gateway(Observers(traces=traces), metrics_by_tenant=True) as gateway:
            yield ports | {"gateway": int(gateway.url.rpartition(":")[2])}, tenant
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def prometheus(tmp_path: Path, ports: dict[str, int]) -> AsyncIterator[httpx.AsyncClient]:
    """Run Prometheus with the alerts, and yield a client of its API."""
    port = free_port()
    configuration = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "1s"},
        "rule_files": [str(ROOT / "docker/alerts.yml")],
        "scrape_configs": [
            {"job_name": job, "scrape_interval": "500ms", "static_configs": [{"targets": [f"127.0.0.1:{each}"]}]}
            for job, each in ports.items()
        ],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    command = [
        program("prometheus", ("prometheus",), "the dashboards"),
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
    ]
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*bound_command(command), stdout=log, stderr=log)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=10) as client:
            yield client
    finally:
        process.terminate()
        await process.wait()


async def ask(client: httpx.AsyncClient, path: str, **parameters: str) -> Any:
    """Return the data of a response of Prometheus, or None while it does not listen."""
    try:
        answer = (await client.get(path, params=parameters)).json()
    except httpx.TransportError:
        return None
    assert answer["status"] == "success", (parameters, answer)
    return answer["data"]


async def test_every_query_has_an_answer(postgres_url: str, valkey_url: str, tmp_path: Path) -> None:
    program("prometheus", ("prometheus",), "the dashboards")
    async with (
        running(postgres_url, valkey_url, tmp_path) as stack,
        serving(stack, tmp_path) as (ports, tenant),
        prometheus(tmp_path, ports) as client,
    ):

        async def send(**more: Any) -> httpx.Response:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports['gateway']}", headers=tenant.headers) as http:
                body = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3} | more
                return await http.post(CHAT, json=body)

        async def scraped() -> bool:
            found = await ask(client, "/query", query="sum(up)")
            return bool(found and found["result"] and float(found["result"][0]["value"][1]) == 3)

        first = await send(stream=True)
        await send(model="unknown")
        await until(scraped)
        await send(stream=True)
        await send(model="unknown")
        name = await _name(client, tenant)
        missing = {title: query.replace("acme", name) for title, query in queries().items()}

        async def all_answered() -> bool:
            for title, query in list(missing.items()):
                found = await ask(client, "/query", query=query)
                if found["result"] and found["result"][0]["value"][1] != "NaN":
                    del missing[title]
            return not missing

        try:
            await until(all_answered, timeout_s=20)
        finally:
            assert missing == {}
        rules = (await ask(client, "/rules"))["groups"][0]["rules"]
        assert {rule["name"] for rule in rules} >= {"LmaasNoGateway", "LmaasBatchesLate"}
        await until(lambda: _healthy(client))
        found = await ask(client, "/query_exemplars", query="lmaas_first_event_seconds_bucket", start="0", end="9999999999")
        ids = {exemplar["labels"]["trace_id"] for series in found for exemplar in series["exemplars"]}
        assert OWN_PREFIX + first.headers["x-request-id"].removeprefix("req_") in ids


async def _healthy(client: httpx.AsyncClient) -> bool:
    rules = (await ask(client, "/rules"))["groups"][0]["rules"]
    assert not [rule["lastError"] for rule in rules if rule.get("lastError")]
    return all(rule["health"] == "ok" for rule in rules)


async def _name(client: httpx.AsyncClient, tenant: Tenant) -> str:
    """Return the tenant's name, as its dashboard finds it."""
    names: list[str] = []

    async def listed() -> bool:
        names[:] = await ask(client, "/label/tenant/values")
        return bool(names)

    await until(listed)
    assert tenant.id not in names
    (name,) = names
    return name
