"""The endpoints of a job runner, and its metrics."""

from pathlib import Path
from typing import Any

import httpx
from prometheus_client import CollectorRegistry

from lmaas.jobs.metrics import JobMetrics
from lmaas.jobs.runner import Runner
from lmaas.jobs.status import status_app

ROOT = Path(__file__).parents[3]


async def test_health_and_metrics() -> None:
    metrics, registry = JobMetrics(), CollectorRegistry()
    registry.register(metrics)
    metrics.line("done")
    metrics.step("validate", "done")
    metrics.lost()
    db: Any = None
    runner = Runner(db, [], metrics.lost)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(status_app(runner, registry)), base_url="http://jobs") as client:
        assert (await client.get("/healthz")).json() == {"status": "ok", "runner": None}
        text = (await client.get("/metrics")).text
    assert 'lmaas_batch_lines_total{event="done"} 1.0' in text
    assert 'lmaas_batch_steps_total{outcome="done",step="validate"} 1.0' in text
    assert "lmaas_job_leases_lost_total 1.0" in text


def test_the_page_of_metrics_names_each() -> None:
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text().partition("## Job runners")[2]
    for family in JobMetrics().collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert f"`{name}`" in page
