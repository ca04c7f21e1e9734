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
from lmaas.control.autoscaler import Memory, Scale, decide
from lmaas.control.idleness import History, Idleness
from lmaas.control.plan import STOP_GRACE_S, Action, Verb, plan
from lmaas.control.pools import Decision, Look, needs_of, policy_of
from lmaas.control.provisioners import Provisioner
from lmaas.control.sharing import Rules, Waits, share
from lmaas.errors import Unavailable
from lmaas.metering.writer import BATCH, take_back, write_events
from lmaas.scheduling.client import CONTROL_CHANNEL, Scheduler, unswallowed
from lmaas.states import Desired, Observed
from lmaas.store.database import Database, Writes, new_id
from lmaas.store.idempotency import delete_old, delete_surplus
from lmaas.store.leadership import LostLead, leading
from lmaas.store.models import BaseModel, list_base_models, list_pool_ids
from lmaas.store.pools import pool_states_by_id, save_pool_state
from lmaas.store.replicas import Replica, add_replica, desire_stop, list_replicas, observe, recent_failures
from lmaas.types import Resources

log = logging.getLogger(__name__)

TICK_S = 1.0
METER_S = 0.2
SWEEP_S = 60.0
#: Replicas take it that no controller is there after 10 s without a look (PRESENT_MS in state.lua).
PRESENT_S = 3.0
#: A decision whose words alone have changed is shown again after this long.
SAVE_S = 5.0


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
        #: Where decisions are written: in `run`, only while nobody else may.
        self._writes: Writes = db
        self._wake = asyncio.Event()
        #: The last decision for each pool, by its base model's id.
        self.decisions: dict[str, Decision] = {}
        #: For whoever looks at us (status.py): whether we are the active one, usage events moved to the ledger, and what the last tick saw.
        self.active = False
        self.moved = 0
        self.seen: dict[str, Seen] = {}
        self._forget()

    def _forget(self) -> None:
        """Begin anew: what was seen before somebody else was active may not be so any more."""
        #: When all pools were last looked at.
        self._looked = float("-inf")
        self._memory: dict[str, Memory] = {}
        self._waits = Waits()
        self._saved: dict[str, tuple[float, Decision, History]] = {}
        self._ready_since: dict[str, dict[str, float]] = {}
        self._there_since: dict[str, dict[str, float]] = {}
        self._stopping_since: dict[str, dict[str, float]] = {}
        self._unknown_since: dict[str, dict[str, float]] = {}
        self._silent_since: dict[str, dict[str, float]] = {}
        self._unheard_since: dict[str, dict[str, float]] = {}
        self.seen.clear()

    async def run(self) -> None:
        """Stand by until no other controller is active, then be the active one; if the lead is lost, stand by again."""
        while True:
            try:
                async with leading(self._db) as lead, asyncio.TaskGroup() as group:
                    log.info("controller active", extra={"action": "lead"})
                    self._writes = lead
                    self._forget()
                    self.active = True
                    group.create_task(lead.lost(), name="leadership")
                    group.create_task(self._listen(), name="signals")
                    group.create_task(self._reconcile_forever(), name="reconciler")
                    group.create_task(self._present_forever(), name="presence")
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

    async def _present_forever(self) -> None:
        """Have replicas know that there is a controller, also while the provisioner keeps it waiting or says no: they stop themselves when
        there is none."""
        while True:
            if time.monotonic() - self._looked > PRESENT_S:
                try:
                    for model in await list_base_models(self._db):
                        await self._scheduler.stats(model.id)
                except (Unavailable, RedisError) as error:
                    log.warning("cannot say that a controller is here", extra={"action": "reconcile", "detail": str(error)})
            await asyncio.sleep(TICK_S)

    async def tick(self) -> None:
        """Look at every pool, decide for all of them, and do what each one's plan says."""
        processes, capacity = await self._provisioner.list(), await self._provisioner.capacity()
        models = await list_base_models(self._db)
        await self._remember(models)
        looks = [await self._look(model, processes, capacity) for model in models]
        now = self._looked = time.monotonic()
        scales = {look.model.id: self._scale(look, now) for look in looks}
        pools = [look.pool(scales[look.model.id], self._ages(look, now)) for look in looks]
        shares, self._waits = share(capacity, pools, self._waits, Rules(self._settings.share_quantum_s), now)
        for look in looks:
            pool_id = look.model.id
            self.decisions[pool_id] = Decision.of(look, scales[pool_id], shares[pool_id])
            await self._reconcile(look, shares[pool_id].replicas, now)
            await self._save(look.model.id, now)
        for replica_id in [replica for replica, pool in processes.items() if pool not in scales]:
            await self._kill(replica_id)
        for pool_id in self.decisions.keys() - scales.keys():
            del self.decisions[pool_id]

    async def _remember(self, models: list[BaseModel]) -> None:
        """The experience of those that were active before us."""
        if any(model.id not in self._memory for model in models):
            states = await pool_states_by_id(self._db)
            for model in models:
                if model.id not in self._memory:
                    stored = states[model.id].idle_times if model.id in states else ()
                    self._memory[model.id] = Memory(idleness=Idleness(History.of(stored)))

    async def _look(self, model: BaseModel, processes: dict[str, str], capacity: Resources | None) -> Look:
        stats = await self._scheduler.stats(model.id)
        rows = await list_replicas(self._db, base_model_id=model.id, limit=None)
        failures, failed_ago_s = await recent_failures(self._db, model.id)
        mine = frozenset(replica for replica, pool in processes.items() if pool == model.id)
        needs = needs_of(model, self._settings, capacity)
        return Look(model, policy_of(model, self._settings), needs, rows, mine, stats, failures, failed_ago_s)

    def _scale(self, look: Look, now: float) -> Scale:
        scale = decide(look.demand, look.policy, look.current, self._memory[look.model.id], now)
        self._memory[look.model.id] = scale.memory
        return scale

    def _ages(self, look: Look, now: float) -> dict[str, float]:
        """For how long each replica has been ready, or there if it is not."""
        there = _seen(self._there_since, look.model.id, {row.id for row in look.rows}, now)
        ready = _seen(self._ready_since, look.model.id, {row.id for row in look.rows if row.observed == Observed.READY}, now)
        return {replica: now - since for replica, since in (there | ready).items()}

    async def _reconcile(self, look: Look, desired: int, now: float) -> None:
        model, rows, stats = look.model, look.rows, look.stats
        observed = tuple(row.observed for row in rows)
        self.seen[model.id] = Seen(model.name, stats["queued"], stats["load"], desired, observed, _newest_start(rows))
        known = {row.id for row in rows}
        ready = {row.id for row in rows if row.observed == Observed.READY}
        starting = {row.id for row in rows if row.observed == Observed.STARTING}
        actions = plan(
            desired,
            rows,
            look.processes,
            look.loads,
            max_replicas=look.policy.max_replicas,
            may_start=look.may_start,
            stop_after_s=self._settings.drain_timeout_s + STOP_GRACE_S,
            start_after_s=self._settings.start_timeout_s,
            unheard_since=_seen(self._unheard_since, model.id, starting - set(stats["replicas"]), now),
            stopping_since=_seen(self._stopping_since, model.id, {row.id for row in rows if row.desired == Desired.STOPPED}, now),
            unknown_since=_seen(self._unknown_since, model.id, look.processes - known, now),
            silent_since=_seen(self._silent_since, model.id, ready - set(stats["replicas"]), now),
            now=now,
        )
        for action in actions:
            await self._do(action, look)
        # What Redis still shows of a replica that ended (its supervisor was killed before it could say so) must get no work.
        for replica_id in stats["replicas"]:
            if replica_id not in known and replica_id not in look.processes:
                await self._scheduler.deregister(model.id, replica_id)

    async def _do(self, action: Action, look: Look) -> None:
        model = look.model
        extra = {"action": action.verb, "replica_id": action.replica, "pool_id": model.id}
        match action.verb:
            case Verb.START:
                replica_id = new_id("rep")
                log.info("starting a replica", extra=extra | {"replica_id": replica_id})
                # The row first: a crash between the two leaves a row without a process, which the next tick writes off. If we stand still
                # there until another controller has done so, what we start then ends by itself.
                if not await add_replica(self._writes, replica_id, model.id):
                    return
                try:
                    await self._provisioner.start(replica_id, model.id, look.needs)
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

    async def _kill(self, replica_id: str) -> None:
        # Processes know nothing of who leads.
        await self._writes.check()
        await self._provisioner.kill(replica_id)

    async def _save(self, pool_id: str, now: float) -> None:
        """Show the decision, and keep the idle times; numbers in its words may change often, and are not worth a write each time."""
        decision, history = self.decisions[pool_id], self._memory[pool_id].idleness.history
        saved = self._saved.get(pool_id)
        if saved is not None:
            at, before, kept = saved
            steady = (before.wanted, before.replicas, before.blocked) == (decision.wanted, decision.replicas, decision.blocked)
            if history is kept and steady and (now - at < SAVE_S or decision == before):
                return
        await save_pool_state(self._writes, pool_id, decision.shown(), history.bins)
        self._saved[pool_id] = (now, decision, history)

    async def _meter_forever(self) -> None:
        looked_aside: set[str] = set()
        while True:
            moved = 0
            try:
                # A swallowed cancellation would leave us neither active nor standing by.
                with unswallowed():
                    for pool_id in await list_pool_ids(self._db):
                        if pool_id not in looked_aside:
                            # The controller before us may have been of an older release than the gateways.
                            await take_back(self._scheduler.redis, pool_id)
                            looked_aside.add(pool_id)
                        count = await write_events(self._scheduler.redis, self._db, pool_id)
                        moved, self.moved = max(moved, count), self.moved + count
            except (Unavailable, RedisError) as error:
                log.warning("usage cannot be written now", extra={"action": "meter", "detail": str(error)})
                await asyncio.sleep(TICK_S)
            if moved < BATCH:
                await asyncio.sleep(METER_S)

    async def _sweep_forever(self) -> None:
        while True:
            try:
                while await delete_old(self._db) or await delete_surplus(self._db):
                    pass
            except Unavailable as error:
                log.warning("old answers cannot be deleted now", extra={"action": "sweep", "detail": str(error)})
            await asyncio.sleep(SWEEP_S)


def _newest_start(rows: Sequence[Replica]) -> Mapping[str, Any]:
    return next((row.start for row in rows if row.start), {})


def _seen(memory: dict[str, dict[str, float]], pool_id: str, present: set[str] | frozenset[str], now: float) -> dict[str, float]:
    """Since when each of `present` has been so; what is not so any more is forgotten."""
    before = memory.get(pool_id, {})
    memory[pool_id] = {item: before.get(item, now) for item in present}
    return memory[pool_id]
