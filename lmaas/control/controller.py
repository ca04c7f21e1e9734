"""The controller: one is active, others stand by. It owns no state; Postgres and Redis hold it."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import RedisError

from lmaas.config import Settings
from lmaas.control.autoscaler import FAILURE_WINDOW_S, Demand, Policy, backoff_s, decide
from lmaas.control.plan import STOP_GRACE_S, Action, Verb, plan
from lmaas.control.provisioners import Provisioner
from lmaas.errors import Unavailable
from lmaas.metering.writer import BATCH, write_events
from lmaas.scheduling.client import CONTROL_CHANNEL, Scheduler
from lmaas.states import Desired, Observed
from lmaas.store.database import Database, new_id
from lmaas.store.idempotency import delete_old
from lmaas.store.leadership import LostLead, leading
from lmaas.store.models import BaseModel, list_base_models
from lmaas.store.replicas import Replica, add_replica, desire_stop, list_replicas, observe, recent_failures

log = logging.getLogger(__name__)

TICK_S = 1.0
METER_S = 0.2
SWEEP_S = 60.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What a tick saw of a pool: requests that wait and sequences that run, replicas desired, what each one there is, and where the time of
    the newest start went (milliseconds by stage, and `by`), if that is known."""

    model: str
    queued: int
    load: int
    desired: int
    observed: tuple[str, ...]
    start: Mapping[str, Any] = field(default_factory=dict)


class Controller:
    """Scales pools, reconciles replicas, and moves usage events to the ledger."""

    def __init__(self, settings: Settings, db: Database, scheduler: Scheduler, provisioner: Provisioner) -> None:
        self._settings, self._db, self._scheduler, self._provisioner = settings, db, scheduler, provisioner
        self._low_since: dict[str, float | None] = {}
        self._stopping_since: dict[str, dict[str, float]] = {}
        self._unknown_since: dict[str, dict[str, float]] = {}
        self._silent_since: dict[str, dict[str, float]] = {}
        self._wake = asyncio.Event()
        #: For whoever looks at us (status.py): whether we are the active one, usage events moved to the ledger, and what the last tick saw.
        self.active = False
        self.moved = 0
        self.seen: dict[str, Seen] = {}

    async def run(self) -> None:
        """Stand by until no other controller is active, then be the active one; if the lead is lost, stand by again."""
        while True:
            try:
                async with leading(self._db) as lead, asyncio.TaskGroup() as group:
                    log.info("controller active", extra={"action": "lead"})
                    self.active = True
                    group.create_task(lead.lost(), name="leadership")
                    group.create_task(self._listen(), name="signals")
                    group.create_task(self._reconcile_forever(), name="reconciler")
                    group.create_task(self._meter_forever(), name="metering-writer")
                    group.create_task(self._sweep_forever(), name="sweeper")
            except* LostLead as lost:
                log.warning("controller standing by", extra={"action": "lead", "detail": str(lost.exceptions[0])})
            finally:
                self.active = False
                self.seen.clear()

    async def _listen(self) -> None:
        async for _ in self._scheduler.listen(CONTROL_CHANNEL):
            self._wake.set()

    async def _reconcile_forever(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self.tick()
            except (Unavailable, RedisError) as error:
                # Replicas go on serving; the next tick continues where this one stopped.
                log.warning("cannot reconcile now", extra={"action": "reconcile", "detail": str(error)})
            # Not asyncio.wait_for: on Python 3.11 it can swallow a cancellation.
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()

    async def tick(self) -> None:
        """Look at every pool once and do what its plan says."""
        processes = await self._provisioner.list()
        models = await list_base_models(self._db)
        for model in models:
            await self._reconcile(model, frozenset(replica for replica, pool in processes.items() if pool == model.id))
        for replica_id in [replica for replica, pool in processes.items() if pool not in {model.id for model in models}]:
            await self._provisioner.kill(replica_id)

    async def _reconcile(self, model: BaseModel, processes: frozenset[str]) -> None:
        stats = await self._scheduler.stats(model.id)
        rows = await list_replicas(self._db, base_model_id=model.id, limit=None)
        current = sum(1 for row in rows if row.desired == Desired.RUNNING)
        policy = self._policy(model)
        demand = Demand(stats["queued"], stats["load"], stats["idle_ms"] / 1000)
        now = time.monotonic()
        scale = decide(demand, policy, current, self._low_since.get(model.id), now)
        self._low_since[model.id] = scale.low_since
        observed = tuple(row.observed for row in rows)
        self.seen[model.id] = Seen(model.name, stats["queued"], stats["load"], scale.replicas, observed, _newest_start(rows))
        failures, since_s = await recent_failures(self._db, model.id, FAILURE_WINDOW_S)
        silent = _seen(
            self._silent_since, model.id, {row.id for row in rows if row.observed == Observed.READY} - set(stats["replicas"]), now
        )
        stopping = _seen(self._stopping_since, model.id, {row.id for row in rows if row.desired == Desired.STOPPED}, now)
        unknown = _seen(self._unknown_since, model.id, processes - {row.id for row in rows}, now)
        actions = plan(
            scale.replicas,
            rows,
            processes,
            {replica: int(facts["load"]) for replica, facts in stats["replicas"].items()},
            max_replicas=policy.max_replicas,
            may_start=since_s >= backoff_s(failures),
            stop_after_s=self._settings.drain_timeout_s + STOP_GRACE_S,
            stopping_since=stopping,
            unknown_since=unknown,
            silent_since=silent,
            now=now,
        )
        for action in actions:
            await self._do(action, model)
        # What Redis still shows of a replica that ended (its supervisor was killed before it could say so) must get no work.
        known = {row.id for row in rows}
        for replica_id in stats["replicas"]:
            if replica_id not in known and replica_id not in processes:
                await self._scheduler.deregister(model.id, replica_id)

    def _policy(self, model: BaseModel) -> Policy:
        """The operator's own bounds, or the settings'."""
        settings = self._settings
        low = model.min_replicas or 0
        high = max(low, settings.engine_max_replicas if model.max_replicas is None else model.max_replicas)
        return Policy(low, high, settings.idle_timeout_s if model.idle_timeout_s is None else model.idle_timeout_s, model.max_num_seqs)

    async def _do(self, action: Action, model: BaseModel) -> None:
        extra = {"action": action.verb, "replica_id": action.replica, "pool_id": model.id}
        match action.verb:
            case Verb.START:
                replica_id = new_id("rep")
                log.info("starting a replica", extra=extra | {"replica_id": replica_id})
                # The row first: a crash between the two leaves a row without a process, which the next tick writes off.
                await add_replica(self._db, replica_id, model.id)
                try:
                    await self._provisioner.start(replica_id, model.id)
                except OSError as error:
                    await observe(self._db, replica_id, Observed.FAILED, reason=f"its supervisor could not be started: {error}")
            case Verb.STOP:
                log.info("stopping a replica", extra=extra)
                await desire_stop(self._db, action.replica)
            case Verb.LOSE:
                log.error("a replica is gone without a word", extra=extra)
                await self._scheduler.deregister(model.id, action.replica)
                await observe(self._db, action.replica, Observed.LOST, reason="its supervisor is gone")
            case Verb.KILL:
                log.error("killing a replica", extra=extra)
                await self._provisioner.kill(action.replica)

    async def _meter_forever(self) -> None:
        while True:
            moved = 0
            try:
                for model in await list_base_models(self._db):
                    count = await write_events(self._scheduler.redis, self._db, model.id)
                    moved, self.moved = max(moved, count), self.moved + count
            except (Unavailable, RedisError) as error:
                log.warning("usage cannot be written now", extra={"action": "meter", "detail": str(error)})
                await asyncio.sleep(TICK_S)
            if moved < BATCH:
                await asyncio.sleep(METER_S)

    async def _sweep_forever(self) -> None:
        while True:
            try:
                while await delete_old(self._db):
                    pass
            except Unavailable as error:
                log.warning("old answers cannot be deleted now", extra={"action": "sweep", "detail": str(error)})
            await asyncio.sleep(SWEEP_S)


def _newest_start(rows: Sequence[Replica]) -> Mapping[str, Any]:
    # Replicas have this record only with h/zygote's migration 0007.
    return next((start for row in rows if (start := getattr(row, "start", None))), {})


def _seen(memory: dict[str, dict[str, float]], pool_id: str, present: set[str] | frozenset[str], now: float) -> dict[str, float]:
    """Since when each of `present` has been so; what is not so any more is forgotten."""
    before = memory.get(pool_id, {})
    memory[pool_id] = {item: before.get(item, now) for item in present}
    return memory[pool_id]
