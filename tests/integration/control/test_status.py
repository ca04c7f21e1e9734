"""The controller's health and metrics endpoints."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lmaas.config import Settings
from lmaas.control.background import BackgroundFigures
from lmaas.control.controller import Controller, PoolStatus
from lmaas.control.status import status_app
from lmaas.scheduling.client import Scheduler
from lmaas.states import EnginePhase, Observed, UsageStatus
from lmaas.store.database import Database
from lmaas.store.engine_time import record_engine_time
from lmaas.store.models import BaseModel, change_base_model, put_base_model
from lmaas.store.replicas import add_replica, observe
from lmaas.store.usage import record_events
from tests.integration.store.build import tenant, usage_event
from tests.support.provisioners import Nowhere

HOME = Path(__file__).parent


@pytest.fixture
def controller(settings: Settings, controller_db: Database, scheduler: Scheduler) -> Controller:
    """A controller that has never been active."""
    return Controller(settings, controller_db, scheduler, Nowhere())  # type: ignore[arg-type]


async def samples(controller: Controller, db: Database) -> dict[tuple[str, ...], float]:
    """Return the value of every sample by its name and the values of its labels."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(status_app(controller, db, HOME)), base_url="http://c") as client:
        text = (await client.get("/metrics")).text
    families = text_string_to_metric_families(text)
    found = {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}
    assert 0 < found.pop(("lmaas_disk_free_bytes",)) < found.pop(("lmaas_disk_bytes",))
    return found


async def health(controller: Controller, db: Database) -> tuple[int, dict[str, str]]:
    """Return the status and the body of /healthz."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(status_app(controller, db, HOME)), base_url="http://c") as client:
        answer = await client.get("/healthz")
    return answer.status_code, answer.json()


async def test_standing_by(controller: Controller, controller_db: Database) -> None:
    """A controller on stand-by is healthy and reports nothing of the pools, which is the active one's task."""
    controller.statuses = {"mod_1": PoolStatus("tiny", 1, 1, 1, ("ready",))}
    assert await health(controller, controller_db) == (200, {"status": "ok", "role": "stand-by"})
    assert await samples(controller, controller_db) == {("lmaas_controller_leader",): 0, ("lmaas_usage_events_moved_total",): 0}


async def test_leading(controller: Controller, db: Database, controller_db: Database, scheduler: Scheduler) -> None:
    values = {"source": "/m", "dtype": "float32", "linears": {}, "max_lora_rank": 8, "max_loras": 2, "max_cpu_loras": 2}
    values |= {"max_num_seqs": 4, "max_model_len": 64, "kv_cache_bytes": 1, "engine_args": ""}
    model = await put_base_model(db, BaseModel(id="", name="tiny", **values))  # type: ignore[arg-type]
    await change_base_model(db, "tiny", {"engine_price": 3_600_000})
    await add_replica(db, "rep_1", model.id)
    for replica_id, states in {
        "rep_2": (Observed.FAILED,),
        "rep_3": (Observed.READY, Observed.LOST),
        "rep_4": (Observed.READY, Observed.FAILED),
        "rep_5": (Observed.READY, Observed.DRAINING, Observed.STOPPED),
    }.items():
        await add_replica(db, replica_id, model.id)
        for state in states:
            await observe(db, replica_id, state)
    for _ in range(3):
        await scheduler.record_event(model.id, "{}")
    day = datetime.now(UTC).date()
    await record_engine_time(
        db, "rep_1", model.id, {(day, EnginePhase.BUSY, 3_600_000): 2000, (day, EnginePhase.IDLE, 0): 500, (day, EnginePhase.BUSY, 0): 250}
    )
    controller.active, controller.moved = True, 7
    start = {"by": "zygote", "spawn_ms": 20, "total_ms": 1500}
    background = BackgroundFigures(900, 90_000, 3600, 5, 4, 2, 17, 350.5, 1)
    controller.statuses = {model.id: PoolStatus("tiny", 3, 2, 1, ("ready", "starting", "ready"), start, background)}
    acme, now = await tenant(db, "acme"), datetime.now(UTC)
    await record_events(
        db,
        [
            usage_event("w1", acme.id, base_model="tiny", status=UsageStatus.WASTED, code="put_back", created_at=now),
            usage_event("w2", acme.id, base_model="tiny", status=UsageStatus.WASTED, created_at=now),
            usage_event("w3", acme.id, base_model="tiny", status=UsageStatus.WASTED, code="put_back", created_at=now - timedelta(hours=2)),
        ],
    )
    assert await health(controller, controller_db) == (200, {"status": "ok", "role": "leader"})
    assert await samples(controller, controller_db) == {
        ("lmaas_controller_leader",): 1,
        ("lmaas_usage_events_moved_total",): 7,
        ("lmaas_pool_queued", "tiny"): 3,
        ("lmaas_pool_running", "tiny"): 2,
        ("lmaas_pool_replicas_desired", "tiny"): 1,
        ("lmaas_pool_replicas", "tiny", "starting"): 1,
        ("lmaas_pool_replicas", "tiny", "ready"): 2,
        ("lmaas_pool_replicas", "tiny", "draining"): 0,
        ("lmaas_replica_start_seconds", "zygote", "tiny", "spawn"): 0.02,
        ("lmaas_replica_start_seconds", "zygote", "tiny", "total"): 1.5,
        ("lmaas_background_lines", "tiny"): 900,
        ("lmaas_background_tokens", "tiny"): 90_000,
        ("lmaas_background_due_seconds", "tiny"): 3600,
        ("lmaas_background_queued", "tiny"): 5,
        ("lmaas_background_running", "tiny"): 4,
        ("lmaas_background_reserve", "tiny"): 2,
        ("lmaas_background_put_back_total", "tiny"): 17,
        ("lmaas_background_tokens_per_second", "tiny"): 350.5,
        ("lmaas_background_replicas", "tiny"): 1,
        ("lmaas_batches", "validating"): 0,
        ("lmaas_batches", "in_progress"): 0,
        ("lmaas_batches", "finalizing"): 0,
        ("lmaas_batches", "cancelling"): 0,
        ("lmaas_wasted_tokens", "put_back", "tiny"): 15,
        ("lmaas_engine_seconds_total", "busy", "tiny"): 2.25,
        ("lmaas_engine_seconds_total", "idle", "tiny"): 0.5,
        ("lmaas_engine_cost_usd_total", "tiny"): 0.002,
        ("lmaas_usage_events_waiting", "tiny"): 3,
        ("lmaas_replicas_failed", "tiny", "starting"): 1,
        ("lmaas_replicas_failed", "tiny", "running"): 2,
        ("lmaas_webhooks_overdue_seconds",): 0,
    }


async def test_without_a_database(controller: Controller, settings: Settings) -> None:
    """Values of the ledger are absent, not zero; all others are present."""
    away = Database("postgresql://nobody@127.0.0.1:1/none")
    controller.active = True
    controller.statuses = {"mod_1": PoolStatus("tiny", 1, 1, 1, ("ready",))}
    found = await samples(controller, away)
    assert found["lmaas_pool_queued", "tiny"] == 1
    assert not [name for name in found if "engine" in name[0]]
    await away.close()


async def test_the_tick_is_what_is_seen(controller: Controller, db: Database) -> None:
    values = {"source": "/m", "dtype": "float32", "linears": {}, "max_lora_rank": 8, "max_loras": 2, "max_cpu_loras": 2}
    values |= {"max_num_seqs": 4, "max_model_len": 64, "kv_cache_bytes": 1, "engine_args": ""}
    model = await put_base_model(db, BaseModel(id="", name="tiny", **values))  # type: ignore[arg-type]
    await controller.tick()
    assert controller.statuses == {model.id: PoolStatus("tiny", 0, 0, 0, ())}
