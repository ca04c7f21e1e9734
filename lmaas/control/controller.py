"""The controller: one process is active, others stand by. Its state is in Postgres and Redis, so any of them can take over."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from redis.exceptions import RedisError

from lmaas.cancellation import unswallowed
from lmaas.config import Settings
from lmaas.control.autoscaler import Scale, ScalingState, decide
from lmaas.control.background import BackgroundFigures, Throughput
from lmaas.control.budgets import BudgetEvents
from lmaas.control.idleness import Idleness, IdleTimes
from lmaas.control.observation import Replicas
from lmaas.control.plan import STOP_GRACE_S, Action, PlanLimits, Verb, plan
from lmaas.control.pools import Decision, PoolObservation, needs_of, policy_of
from lmaas.control.provisioners import Provisioner
from lmaas.control.sharing import SharingRules, WaitingSince, share
from lmaas.control.sweeper import FileSweeper, Sweeper
from lmaas.errors import Unavailable
from lmaas.files.service import Files
from lmaas.metering.writer import EVENTS_AT_ONCE, take_back, waiting_events, write_events
from lmaas.scheduling.client import CONTROL_CHANNEL, Scheduler
from lmaas.states import Observed
from lmaas.store.backlog import done_tokens, waiting_lines
from lmaas.store.database import Database, Writes, new_id
from lmaas.store.leadership import LostLead, leading
from lmaas.store.models import BaseModel, list_base_models, list_pool_ids
from lmaas.store.pools import pool_states_by_id, save_pool_state
from lmaas.store.replicas import Replica, add_replica, desire_stop, list_replicas, observe, recent_failures
from lmaas.types import Resources

log = logging.getLogger(__name__)

TICK_S = 1.0
METER_S = 0.2
#: Replicas assume that there is no controller if it has not read their pool for 10 s (PRESENT_MS in layout.lua).
PRESENT_S = 3.0
#: A decision of which only the reason has changed is saved again after this long.
SAVE_S = 2.0


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """A pool after the last tick, for metrics: queued requests, running sequences, desired replicas, the state of each observed replica,
    the duration of the newest start's stages (milliseconds by stage, and `by`) if they are known, and its background work."""

    model: str
    queued: int
    load: int
    desired: int
    observed: tuple[str, ...]
    start: Mapping[str, Any] = field(default_factory=dict)
    background: BackgroundFigures = field(default_factory=BackgroundFigures)


class Controller:
    """Scales pools, reconciles replicas, and moves usage events to the ledger."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        scheduler: Scheduler,
        provisioner: Provisioner,
        clock: Callable[[], float] = time.monotonic,
        files: Files | None = None,
    ) -> None:
        self._settings, self._db, self._scheduler, self._provisioner, self._clock = settings, db, scheduler, provisioner, clock
        #: The target of decisions. In `run` this is the session that holds the lead.
        self._writes: Writes = db
        self._wake = asyncio.Event()
        #: The last decision for each pool, by its base model's id.
        self.decisions: dict[str, Decision] = {}
        #: For status.py: whether this controller is the active one, the usage events it moved to the ledger, and the pools by id.
        self.active = False
        self.moved = 0
        self.statuses: dict[str, PoolStatus] = {}
        self.sweeper = Sweeper(db, settings.max_stored_bytes)
        #: None for a controller without an object store, whose files another one deletes.
        self.file_sweeper = None if files is None else FileSweeper(files)
        self._forget()

    async def waiting_events(self) -> dict[str, int]:
        """Return the usage events of each pool, by its base model's name, that are not in the ledger yet. Raises RedisError."""
        statuses = dict(self.statuses)
        counts = await waiting_events(self._scheduler.redis, statuses)
        return {statuses[pool_id].model: count for pool_id, count in counts.items()}

    def _forget(self) -> None:
        #: The time at which all pools were last read.
        self._read_at = float("-inf")
        self._scaling: dict[str, ScalingState] = {}
        self._throughput: dict[str, Throughput] = {}
        self._waiting = WaitingSince()
        self._saved: dict[str, tuple[float, Decision, IdleTimes]] = {}
        #: The replicas of each pool as the last tick observed them.
        self._replicas: dict[str, Replicas] = {}
        self.statuses.clear()

    def lead(self, writes: Writes) -> None:
        """Become the active controller, which writes through `writes`. Earlier observations are dropped: another controller may have been
        active since."""
        self._writes = writes
        self._forget()
        self.active = True

    async def run(self) -> None:
        """Stand by until no other controller is active, then become the active one. If the lead is lost, stand by again."""
        while True:
            try:
                async with leading(self._db) as lead, asyncio.TaskGroup() as group:
                    log.info("controller active", extra={"action": "lead"})
                    self.lead(lead)
                    group.create_task(lead.lost(), name="leadership")
                    group.create_task(self._listen(), name="signals")
                    group.create_task(self._reconcile_forever(), name="reconciler")
                    group.create_task(self._present_forever(), name="presence")
                    group.create_task(self._meter_forever(), name="metering-writer")
                    group.create_task(self.sweeper.run(), name="sweeper")
                    group.create_task(BudgetEvents(self._db).run(), name="budget-events")
                    if self.file_sweeper is not None:
                        group.create_task(self.file_sweeper.run(), name="file-sweeper")
            except* LostLead as lost:
                log.warning("controller standing by", extra={"action": "lead", "detail": str(lost.exceptions[0])})
            finally:
                self.active = False
                self.statuses.clear()

    async def _listen(self) -> None:
        async for _ in self._scheduler.listen(CONTROL_CHANNEL):
            self._wake.set()

    async def _reconcile_forever(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self.tick()
            except (Unavailable, RedisError) as error:
                # Replicas continue to serve. The next tick continues where this one stopped.
                log.warning("cannot reconcile now", extra={"action": "reconcile", "detail": str(error)})
            # Not asyncio.wait_for: on Python 3.11 it can swallow a cancellation.
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()

    async def _present_forever(self) -> None:
        """Show replicas that there is a controller while ticks are delayed, for instance by the provisioner. Without a controller, replicas
        stop themselves."""
        while True:
            if self._clock() - self._read_at > PRESENT_S:
                try:
                    for model in await list_base_models(self._db):
                        await self._scheduler.stats(model.id)
                except (Unavailable, RedisError) as error:
                    log.warning("cannot show replicas that there is a controller", extra={"action": "reconcile", "detail": str(error)})
            await asyncio.sleep(TICK_S)

    async def tick(self) -> None:
        """Read every pool, decide for all of them, and carry out the plan of each."""
        processes, capacity = await self._provisioner.list(), await self._provisioner.capacity()
        models = await list_base_models(self._db)
        await self._remember(models)
        waiting, has_runner = await waiting_lines(self._db)
        done = await done_tokens(self._db)
        read = [
            replace(
                await self._read(model, processes, capacity),
                waiting=waiting.get(model.id, ()),
                done=done.get(model.id, {}),
                has_runner=has_runner,
            )
            for model in models
        ]
        now = self._read_at = self._clock()
        pools = {pool.model.id: pool.advanced(self._replicas.get(pool.model.id, {}), now) for pool in read}
        self._replicas = {pool_id: pool.replicas for pool_id, pool in pools.items()}
        scales = {pool_id: self._scale(pool, now) for pool_id, pool in pools.items()}
        claims = [pool.claim(scales[pool_id], now) for pool_id, pool in pools.items()]
        shares, self._waiting = share(capacity, claims, self._waiting, SharingRules(self._settings.share_quantum_s), now)
        for pool_id, pool in pools.items():
            self.decisions[pool_id] = Decision.of(pool, scales[pool_id], shares[pool_id], self._throughput[pool_id])
            await self._reconcile(pool, shares[pool_id].replicas, now)
            await self._save(pool_id, now)
        for replica_id in [replica for replica, pool_id in processes.items() if pool_id not in pools]:
            await self._kill(replica_id)
        for pool_id in self.decisions.keys() - pools.keys():
            del self.decisions[pool_id]

    async def _remember(self, models: list[BaseModel]) -> None:
        """Load the idle times and the throughput of background work that earlier controllers recorded."""
        if any(model.id not in self._scaling for model in models):
            states = await pool_states_by_id(self._db)
            for model in models:
                if model.id not in self._scaling:
                    stored = states[model.id].idle_times if model.id in states else ()
                    self._scaling[model.id] = ScalingState(idleness=Idleness(IdleTimes.of(stored)))
                    decided = states[model.id].decision if model.id in states else {}
                    background = decided.get("background")
                    rate = background.get("tokens_per_s") if isinstance(background, dict) else None
                    self._throughput[model.id] = Throughput.of(rate)

    async def _read(self, model: BaseModel, processes: dict[str, str], capacity: Resources | None) -> PoolObservation:
        delay_s, first_s = self._provisioner.start_delay_s(), self._provisioner.first_start_s()
        stats = await self._scheduler.stats(model.id, round(1000 * delay_s), round(1000 * first_s))
        rows = await list_replicas(self._db, base_model_id=model.id)
        failures, failed_ago_s = await recent_failures(self._db, model.id)
        mine = frozenset(replica for replica, pool_id in processes.items() if pool_id == model.id)
        needs = needs_of(model, self._settings, capacity)
        return PoolObservation(model, policy_of(model, self._settings), needs, rows, mine, stats, failures, failed_ago_s)

    def _scale(self, pool: PoolObservation, now: float) -> Scale:
        throughput = self._throughput[pool.model.id] = pool.throughput(self._throughput[pool.model.id], now)
        backlog = pool.backlog(throughput.tokens_per_s)
        scale = decide(pool.demand, pool.policy, pool.current, self._scaling[pool.model.id], now, backlog)
        self._scaling[pool.model.id] = scale.state
        return scale

    async def _reconcile(self, pool: PoolObservation, desired: int, now: float) -> None:
        model, rows, stats, settings = pool.model, pool.rows, pool.stats, self._settings
        observed = tuple(row.observed for row in rows)
        background = self.decisions[model.id].background
        queued, load = stats["queued"], stats["load"]
        self.statuses[model.id] = PoolStatus(model.name, queued, load, desired, observed, _newest_start(rows), background)
        stop_after_s = settings.drain_timeout_s + STOP_GRACE_S
        limits = PlanLimits(pool.policy.max_replicas, pool.may_start, stop_after_s, settings.start_timeout_s)
        for action in plan(desired, pool.replicas, limits, now):
            await self._do(action, pool)

    async def _do(self, action: Action, pool: PoolObservation) -> None:
        model = pool.model
        extra = {"action": action.verb, "replica_id": action.replica, "pool_id": model.id}
        match action.verb:
            case Verb.START:
                replica_id = new_id("rep")
                log.info("starting a replica", extra=extra | {"replica_id": replica_id})
                # The row is written first. A crash between the two leaves a row without a process, which the next tick records as lost. If
                # this process is suspended there until another controller has done that, the supervisor that is started later finds this
                # and ends.
                if not await add_replica(self._writes, replica_id, model.id):
                    return
                try:
                    await self._provisioner.start(replica_id, model.id, pool.needs)
                except OSError as error:
                    await observe(self._writes, replica_id, Observed.FAILED, reason=f"its supervisor could not be started: {error}")
            case Verb.STOP:
                log.info("stopping a replica", extra=extra)
                await desire_stop(self._writes, action.replica)
            case Verb.LOSE:
                words = await self._provisioner.last_words(action.replica)
                reason = f"its supervisor is gone: {words}" if words else "its supervisor is gone"
                log.error("a replica is gone", extra=extra | {"detail": reason})
                await observe(self._writes, action.replica, Observed.LOST, reason=reason)
                await self._scheduler.deregister(model.id, action.replica)
            case Verb.GIVE_UP:
                log.error("a replica has not begun to start", extra=extra)
                waited_s = self._settings.start_timeout_s
                reason = f"its supervisor has not begun within {waited_s:g} s: no machine had room for it, or could run it"
                await observe(self._writes, action.replica, Observed.FAILED, reason=reason)
                await self._kill(action.replica)
            case Verb.KILL:
                log.error("killing a replica", extra=extra)
                await self._kill(action.replica)
            case Verb.DEREGISTER:
                await self._scheduler.deregister(model.id, action.replica)

    async def _kill(self, replica_id: str) -> None:
        # Unlike the database, the provisioner does not check which controller has the lead.
        await self._writes.check()
        await self._provisioner.kill(replica_id)

    async def _save(self, pool_id: str, now: float) -> None:
        """Save the decision for the API, and the idle times. The numbers in its reason change often and do not cause a write each time."""
        decision, idle_times = self.decisions[pool_id], self._scaling[pool_id].idleness.times
        saved = self._saved.get(pool_id)
        if saved is not None:
            at, before, kept = saved
            steady = (before.wanted, before.replicas, before.blocked) == (decision.wanted, decision.replicas, decision.blocked)
            if idle_times is kept and steady and (now - at < SAVE_S or decision == before):
                return
        await save_pool_state(self._writes, pool_id, decision.shown(), idle_times.bins)
        self._saved[pool_id] = (now, decision, idle_times)

    async def _meter_forever(self) -> None:
        checked: set[str] = set()
        while True:
            moved = 0
            try:
                # If a cancellation were swallowed, this process would be neither active nor standing by.
                with unswallowed():
                    for pool_id in await list_pool_ids(self._db):
                        if pool_id not in checked:
                            # The previous controller may have been of an older release than the gateways.
                            await take_back(self._scheduler.redis, pool_id)
                            checked.add(pool_id)
                        count = await write_events(self._scheduler.redis, self._db, pool_id)
                        moved, self.moved = max(moved, count), self.moved + count
            except (Unavailable, RedisError) as error:
                log.warning("usage cannot be written now", extra={"action": "meter", "detail": str(error)})
                await asyncio.sleep(TICK_S)
            if moved < EVENTS_AT_ONCE:
                await asyncio.sleep(METER_S)


def _newest_start(rows: Sequence[Replica]) -> Mapping[str, Any]:
    return next((row.start for row in rows if row.start), {})
