"""The controller's health and metrics endpoints, which a standby controller serves too. They are off unless LMAAS_CONTROLLER_PORT is set.

The metrics name pools and no tenants. Even so, the endpoints belong in a private network.
"""

import functools
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from redis.exceptions import RedisError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lmaas.config import Settings
from lmaas.control.controller import Controller
from lmaas.errors import Unavailable
from lmaas.http import JsonResponse, metrics_response
from lmaas.private_server import serve_privately
from lmaas.states import Observed
from lmaas.store.batches import open_batches
from lmaas.store.database import Database
from lmaas.store.deliveries import overdue_s
from lmaas.store.engine_time import PoolTime, pool_times
from lmaas.store.replicas import PoolFailures, failures_by_pool
from lmaas.store.usage import PoolWaste, recent_waste

MICROUSD_PER_USD = 1_000_000


@dataclass(frozen=True, slots=True)
class Ledger:
    """Figures from the database: engine time of all days, recently wasted tokens, the number of unfinished batches in each state, and the
    replicas that failed recently."""

    times: Iterable[PoolTime]
    waste: Iterable[PoolWaste]
    batches: Mapping[str, int]
    failures: Iterable[PoolFailures]
    #: For how long the oldest event has waited that is due at a webhook.
    webhooks_overdue_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Disk:
    """The disk of a controller's home folder, in bytes."""

    size: int
    free: int


def metrics(controller: Controller, disk: Disk, ledger: Ledger | None, waiting: Mapping[str, int] | None) -> list[Metric]:
    """Return the metrics. Only the active controller reports pools, so that a sum over all controllers counts each pool once.

    `ledger` is None while the database is away, and `waiting`, the usage events that are not in the ledger yet, while the queue is. The
    metrics from them are then absent, not zero.
    """
    leader = GaugeMetricFamily("lmaas_controller_leader", "1 for the active controller, 0 for one that stands by.")
    leader.add_metric([], float(controller.active))
    moved = CounterMetricFamily("lmaas_usage_events_moved", "Usage events that this controller moved to the ledger.")
    moved.add_metric([], controller.moved)
    size = GaugeMetricFamily("lmaas_disk_bytes", "Size of the disk of this controller's home folder.", value=disk.size)
    free = GaugeMetricFamily("lmaas_disk_free_bytes", "Free space of this disk.", value=disk.free)
    found: list[Metric] = [leader, moved, size, free]
    if not controller.active:
        return found
    queued = GaugeMetricFamily("lmaas_pool_queued", "Requests that wait for a lease.", labels=["pool"])
    running = GaugeMetricFamily("lmaas_pool_running", "Sequences that run.", labels=["pool"])
    desired = GaugeMetricFamily("lmaas_pool_replicas_desired", "Replicas that the autoscaler wants.", labels=["pool"])
    replicas = GaugeMetricFamily("lmaas_pool_replicas", "Replicas by observed state.", labels=["pool", "state"])
    start = GaugeMetricFamily(
        "lmaas_replica_start_seconds", "The newest start of a replica that runs: how long each stage took.", labels=["pool", "stage", "by"]
    )
    for pool in list(controller.statuses.values()):
        for stage, ms in pool.start.items():
            if stage.endswith("_ms"):
                start.add_metric([pool.model, stage.removesuffix("_ms"), str(pool.start.get("by", ""))], ms / 1000)
        queued.add_metric([pool.model], pool.queued)
        running.add_metric([pool.model], pool.load)
        desired.add_metric([pool.model], pool.desired)
        for state in (Observed.STARTING, Observed.READY, Observed.DRAINING):
            replicas.add_metric([pool.model, state], pool.observed.count(state))
    found += _background(controller)
    stored = GaugeMetricFamily("lmaas_stored_bytes", "Stored responses and conversations of all tenants, as last counted.")
    if controller.sweeper.stored_bytes is not None:
        stored.add_metric([], controller.sweeper.stored_bytes)
    file_bytes = GaugeMetricFamily("lmaas_file_bytes", "Files of all tenants in bytes, as last counted.")
    file_count = GaugeMetricFamily("lmaas_files", "Files of all tenants, as last counted.")
    if controller.file_sweeper is not None and controller.file_sweeper.stored is not None:
        count, size_bytes = controller.file_sweeper.stored
        file_count.add_metric([], count)
        file_bytes.add_metric([], size_bytes)
    behind = GaugeMetricFamily("lmaas_usage_events_waiting", "Usage events that are not in the ledger yet.", labels=["pool"])
    for name, count in (waiting or {}).items():
        behind.add_metric([name], count)
    found += [queued, running, desired, replicas, start, stored, file_count, file_bytes, behind]
    return found + (_bill(ledger) if ledger is not None else [])


def _background(controller: Controller) -> list[Metric]:
    """Return the metrics of background work."""

    def gauge(name: str, text: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"lmaas_background_{name}", text, labels=["pool"])

    lines = gauge("lines", "Lines of batches that wait.")
    tokens = gauge("tokens", "Estimated tokens of these lines.")
    due = gauge("due_seconds", "Time until the earliest deadline of these lines.")
    queued = gauge("queued", "Background requests that wait for a slot in the queue.")
    running = gauge("running", "Background sequences that run.")
    reserve = gauge("reserve", "Slots that background work leaves free for interactive requests.")
    speed = gauge("tokens_per_second", "Estimated tokens of background work that one replica processes in a second.")
    replicas = gauge("replicas", "Replicas that the autoscaler wants for background work only.")
    put_back = CounterMetricFamily("lmaas_background_put_back", "Background requests whose slot was taken back.", labels=["pool"])
    for pool in list(controller.statuses.values()):
        figures = pool.background
        for family, value in (
            (lines, figures.lines),
            (tokens, figures.tokens),
            (due, figures.due_s),
            (queued, figures.queued),
            (running, figures.running),
            (reserve, figures.reserve),
            (speed, figures.tokens_per_s),
            (replicas, figures.replicas),
            (put_back, figures.put_back),
        ):
            if value is not None:
                family.add_metric([pool.model], value)
    return [lines, tokens, due, queued, running, reserve, speed, replicas, put_back]


def _bill(ledger: Ledger) -> list[Metric]:
    seconds = CounterMetricFamily("lmaas_engine_seconds", "Engine time by phase, from the ledger.", labels=["pool", "phase"])
    cost = CounterMetricFamily("lmaas_engine_cost_usd", "What that time cost (COGS), from the ledger.", labels=["pool"])
    wasted = GaugeMetricFamily(
        "lmaas_wasted_tokens", "Tokens of attempts without a result that began in the last ten minutes, by reason.", labels=["pool", "code"]
    )
    for waste in ledger.waste:
        wasted.add_metric([waste.base_model, waste.code], waste.tokens)
    costs: dict[str, float] = {}
    for time in ledger.times:
        seconds.add_metric([time.base_model, time.phase], time.ms / 1000)
        costs[time.base_model] = costs.get(time.base_model, 0.0) + time.cost_microusd / MICROUSD_PER_USD
    for pool, dollars in costs.items():
        cost.add_metric([pool], dollars)
    batches = GaugeMetricFamily("lmaas_batches", "Batches that have not ended, by status.", labels=["status"])
    for status, count in ledger.batches.items():
        batches.add_metric([status], count)
    failed = GaugeMetricFamily(
        "lmaas_replicas_failed", "Replicas that failed in the last ten minutes, `starting` or `running`.", labels=["pool", "stage"]
    )
    for failures in ledger.failures:
        failed.add_metric([failures.base_model, "starting"], failures.starting)
        failed.add_metric([failures.base_model, "running"], failures.running)
    overdue = GaugeMetricFamily("lmaas_webhooks_overdue_seconds", "For how long the oldest event has waited that is due at a webhook.")
    overdue.add_metric([], ledger.webhooks_overdue_s)
    return [seconds, cost, wasted, batches, failed, overdue]


class _Once(Collector):
    """Metrics that were gathered for one response."""

    def __init__(self, found: list[Metric]) -> None:
        self._found = found

    def collect(self) -> Iterable[Metric]:
        """Return all metrics."""
        return self._found


def status_app(controller: Controller, db: Database, home: Path) -> Starlette:
    """Return the application with `/healthz` and `/metrics` of a controller with this home folder."""
    return Starlette(
        routes=[
            Route("/healthz", functools.partial(_health, controller)),
            Route("/metrics", functools.partial(_metrics, controller, db, home)),
        ]
    )


async def _health(controller: Controller, _: Request) -> Response:
    return JsonResponse({"status": "ok", "role": "leader" if controller.active else "stand-by"})


async def _metrics(controller: Controller, db: Database, home: Path, request: Request) -> Response:
    ledger = waiting = None
    if controller.active:
        with suppress(Unavailable):
            ledger = Ledger(
                await pool_times(db), await recent_waste(db), await open_batches(db), await failures_by_pool(db), await overdue_s(db)
            )
        with suppress(RedisError):
            waiting = await controller.waiting_events()
    usage = shutil.disk_usage(home)
    registry = CollectorRegistry()
    registry.register(_Once(metrics(controller, Disk(usage.total, usage.free), ledger, waiting)))
    return metrics_response(registry, request)


async def serve_status(settings: Settings, controller: Controller, db: Database) -> None:
    """Serve the endpoints on `controller_port` until cancelled."""
    await serve_privately(status_app(controller, db, settings.home), settings.host, settings.controller_port or 0)
