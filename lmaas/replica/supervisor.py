"""The life of one replica: start the engine, wait until it works, report it to the scheduler, drain it, stop it.

The supervisor restarts nothing. If its engine ends, it records the reason and ends as well. The controller decides whether to start another
replica.
"""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from lmaas.adapters.objects import AdapterFiles
from lmaas.config import Settings
from lmaas.engine.client import CONNECTION_ERRORS, EngineClient, EngineError
from lmaas.engine.launch import EngineProcess, EngineSpec, launched, spec_of, url_of
from lmaas.errors import Unavailable
from lmaas.metering.engine_time import phase_when_ready
from lmaas.metering.usage import UsageRecord
from lmaas.replica.address import address_of, free_port
from lmaas.replica.progress import StartProgress
from lmaas.replica.residency import Residency
from lmaas.replica.start import Times, process_began, start_record
from lmaas.replica.timesheet import TimeSheet
from lmaas.scheduling.client import Beat, Scheduler, replica_channel
from lmaas.states import Desired, EnginePhase, Observed, PoolKind, UsageStatus
from lmaas.store.database import Database, new_id
from lmaas.store.models import BaseModel
from lmaas.store.replicas import get_replica, observe, usual_start_ms

log = logging.getLogger(__name__)

BEAT_S = 1.0
#: The interval between health checks of a starting engine.
HEALTH_POLL_S = 0.025
#: If requests run but no token is counted for this long, the engine is probed. A long prefill alone does not mean that it has failed.
STALL_S = 20.0
PROBE_TIMEOUT_S = 30.0
#: If the engine's server does not respond for this long, the engine gets no new work and is probed. After the same time again it counts as
#: failed.
MUTE_S = 10.0


@dataclass(frozen=True, slots=True)
class Ending:
    """The reason for a replica's end, and the state in which the replica ends."""

    state: Observed
    reason: str


class Supervisor:
    """Supervises one engine for the replica `replica_id` of `model`'s pool. `run` lasts as long as the replica."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        scheduler: Scheduler,
        files: AdapterFiles,
        client: EngineClient,
        model: BaseModel,
        replica_id: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._db, self._scheduler, self._client = settings, db, scheduler, client
        self._model, self._id = model, replica_id
        self._folder = settings.home / "replicas" / replica_id
        self._sheet = TimeSheet(db, replica_id, model, clock)
        self._residency = Residency(
            model.id,
            replica_id,
            scheduler,
            client,
            files,
            self._folder / "adapters",
            max(model.max_cpu_loras, model.max_loras),
            on_granted=lambda: self._sheet.observe(EnginePhase.BUSY),
        )
        self._state = Observed.STARTING
        self._ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._wake = asyncio.Event()
        self._times = Times(process_began())
        self._home = settings.home if settings.zygote == "on" else None
        self._engine: EngineProcess | None = None
        self._progress = StartProgress()
        self._ready = False
        #: The usual duration of such a start. None once it has been reported, after this engine's start.
        self._start_ms: int | None = None
        self._load = 0
        self._only_background = False
        self._counted: float | None = None
        self._probing: asyncio.Task[bool] | None = None
        self._doubted = False
        self._controller_seen = time.monotonic()
        self._busy_seen = time.monotonic()

    def end(self, state: Observed, reason: str) -> None:
        """End the replica. Only the first call has an effect."""
        if not self._ending.done():
            self._ending.set_result(Ending(state, reason))

    async def run(self) -> Ending:
        """Run the replica until it is stopped or its engine ends. The engine has exited and its memory is free when this returns."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.end, Observed.STOPPED, "the supervisor was told to stop")
        # An address instead of a name, so that gateways reach the engine even while a name server is down or busy.
        settings = self._settings
        spec = spec_of(self._model, settings.engine_module, await address_of(settings.engine_host), settings.traces_url)
        port = free_port(spec.host)
        url = url_of(spec.host, port)
        async with self._sheet.kept(), AsyncExitStack() as stack:
            tasks: list[asyncio.Task[Any]] = [
                asyncio.create_task(coroutine, name=name)
                for name, coroutine in {
                    "engine": self._run_engine(spec, port, stack),
                    "usual-start": self._learn_usual_start("plain" if self._home is None else "zygote"),
                    "heartbeat": self._beat(url),
                    "signals": self._listen(),
                    "desire": self._watch_desire(url),
                    "time-sheet": self._sheet.write_forever(),
                }.items()
            ]
            try:
                ending = await self._first_ending(tasks)
                if ending.state is Observed.STOPPED and self._engine is not None:
                    await self._drain(self._engine)
            finally:
                if self._probing is not None:
                    tasks.append(self._probing)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                # Stopping the engine may take a while. Requests that wait on this replica can move elsewhere before that.
                with contextlib.suppress(Unavailable):
                    await self._scheduler.deregister(self._model.id, self._id)
        await self._residency.close()
        with contextlib.suppress(Unavailable):
            await observe(self._db, self._id, ending.state, reason=ending.reason)
        level = logging.INFO if ending.state is Observed.STOPPED else logging.ERROR
        log.log(level, "replica ended", extra=self._extra("end", ending.reason))
        return ending

    async def _run_engine(self, spec: EngineSpec, port: int, stack: AsyncExitStack) -> None:
        """Start the engine, prepare it, and watch it. `stack` stops it in the end. Heartbeats run at the same time, because the start may
        wait for the zygote."""
        launching = launched(spec, port, self._folder / "engine.log", self._home, self._progress.saw)
        engine = self._engine = await stack.enter_async_context(launching)
        self._progress.began(engine)
        self._times.began, self._times.waited = engine.began, self._progress.waited_s
        log.info("engine starting", extra=self._extra("start", f"pid {engine.pid}, {engine.by}"))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_engine(engine), name="engine-exit")
            group.create_task(self._learn_usual_start(engine.by), name="usual-start")
            group.create_task(self._get_ready(engine), name="engine-start")
            group.create_task(self._watch_liveness(engine.url), name="liveness")
            group.create_task(self._watch_grammars(engine), name="grammars")

    async def _first_ending(self, tasks: list["asyncio.Task[Any]"]) -> Ending:
        """Return the reason and state of the end. The first unexpected failure of a task is raised, which ends the replica as well."""
        waiting: set[asyncio.Future[Any]] = {self._ending, *tasks}
        while not self._ending.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {self._ending}:
                task.result()
        return self._ending.result()

    def _extra(self, action: str, detail: str = "") -> dict[str, str]:
        return {"action": action, "replica_id": self._id, "pool_id": self._model.id, "detail": detail}

    async def _watch_engine(self, engine: EngineProcess) -> None:
        code = await engine.exited()
        self.end(Observed.FAILED, f"the engine ended with code {code}: {engine.last_words()}")

    async def _get_ready(self, engine: EngineProcess) -> None:
        """Wait until the engine is ready, that is, until it has generated or embedded a token, and report it."""
        watching = asyncio.create_task(self._watch_start(engine), name="start-progress")
        try:
            await self._become_ready(engine)
        finally:
            watching.cancel()

    async def _watch_start(self, engine: EngineProcess) -> None:
        reason = await self._progress.until_stuck(engine, self._settings.start_timeout_s)
        self.end(Observed.FAILED, f"{reason}: {engine.last_words()}")

    async def _become_ready(self, engine: EngineProcess) -> None:
        while not await self._client.healthy(engine.url):  # noqa: ASYNC110 (it is another process that gets healthy)
            await asyncio.sleep(HEALTH_POLL_S)
        self._times.healthy = time.monotonic()
        if self._model.takes_adapters and not engine.keeps_adapters_apart():
            self.end(Observed.FAILED, "the engine runs without the LoRA plugin of lmaas, and would mix up tenants' adapters")
            return
        # Load adapters that requests wait for before the replica becomes ready.
        warming = asyncio.create_task(self._warm(engine), name="warm")
        warming.add_done_callback(lambda _: setattr(self._times, "resident", time.monotonic()))
        try:
            if not await self._probe(engine, max(PROBE_TIMEOUT_S, self._settings.start_timeout_s)):
                self.end(Observed.FAILED, self._fruitless(engine))
                return
            self._times.generated = time.monotonic()
            engine.seal_log()
            await warming
        finally:
            warming.cancel()
        self._times.ready = time.monotonic()
        self._ready = True
        self._sheet.observe(EnginePhase.IDLE)
        record = start_record(engine.by, self._times, engine.marks())
        if not await self._true_if_unavailable(observe(self._db, self._id, Observed.READY, url=engine.url, start=record)):
            self.end(Observed.STOPPED, "this replica is not desired any more")
            return
        self._state = Observed.READY
        self._wake.set()
        log.info("engine ready", extra=self._extra("ready", f"after {record['total_ms']} ms"))
        await self._learn_usual_start(engine.by)

    async def _warm(self, engine: EngineProcess) -> None:
        if self._residency.awaits:
            engine.seal_log()  # the adapters belong to tenants
        await self._residency.warm(engine.url)

    async def _learn_usual_start(self, by: str) -> None:
        """Read the usual duration of a start of this kind, for clients that wait for one."""
        with contextlib.suppress(Unavailable):
            self._start_ms = await usual_start_ms(self._db, self._model.id, by)
            self._progress.usual_s = None if self._start_ms is None else self._start_ms / 1000

    async def _true_if_unavailable(self, attempt: Awaitable[bool]) -> bool:
        """Return the result of `attempt`, or true if the database is unavailable, since nothing then shows a lost race."""
        try:
            return await attempt
        except Unavailable:
            return True

    def _fruitless(self, engine: EngineProcess | None) -> str:
        verb = "embed" if self._model.kind is PoolKind.EMBED else "generate"
        return f"the engine does not {verb}: {'' if engine is None else engine.last_words()}"

    async def _probe(self, engine: EngineProcess, timeout_s: float) -> bool:
        """Have the engine generate or embed a token. Its usage is recorded in the ledger without a tenant."""
        record = UsageRecord(new_id("probe"), None, None, self._model.name, self._model.name, None, None, stream=False)
        record.start(self._id, 0, 0)
        try:
            probe = self._client.embed_token if self._model.kind is PoolKind.EMBED else self._client.generate_token
            result = await probe(engine.url, self._model.name, record.request_id, timeout_s)
        except (EngineError, *CONNECTION_ERRORS) as error:
            log.warning("probe failed", extra=self._extra("probe", repr(error)))
            return False
        record.count({"prompt_tokens": result.prompt_tokens, "completion_tokens": result.completion_tokens})
        record.cached_tokens = result.cached_tokens
        record.end(UsageStatus.PROBE)
        with contextlib.suppress(Unavailable):
            await self._scheduler.record_event(self._model.id, record.event())
        return True

    async def _beat(self, url: str) -> None:
        cleared = False
        while True:
            self._wake.clear()
            left_ms, late_ms = self._progress.left_ms() if self._state is Observed.STARTING else (None, None)
            beat = Beat(
                url=url,
                slots=self._model.max_num_seqs,
                adapter_slots=self._model.max_loras,
                state=self._state,
                resident=sorted(self._residency.resident),
                cleared=cleared,
                suspect=self._doubted,
                start_ms=self._start_ms,
                left_ms=left_ms,
                late_ms=late_ms,
            )
            try:
                reply = await self._scheduler.heartbeat(self._model.id, self._id, beat)
            except Unavailable:
                # Running requests continue, and Redis may recover.
                log.warning("no heartbeat: the queue is away", extra=self._extra("heartbeat"))
                moves = await self._moves(url)
                self._see(controller=False, busy=moves)
                self._saw_load(int(moves), 0)
                await asyncio.sleep(BEAT_S)
                continue
            cleared = False
            self._doubted = self._doubted and not beat.suspect
            if beat.state is not Observed.STARTING and beat.start_ms == self._start_ms:
                # Reported once only, because replicas that were started by the other means would overwrite it every second.
                self._start_ms = None
            self._load = int(reply["load"])
            # Counts tickets, not slots: if one of a request's sequences waits for an adapter, all of them do.
            waiting = sum(reply["running"].get(adapter, 0) for adapter in reply["loads"])
            self._saw_load(self._load, waiting, int(reply["background"]))
            self._see(controller=bool(reply["controller"]), busy=self._load > 0)
            if self._state is Observed.STARTING:
                self._residency.prepare(reply.get("warm") or {})
            else:
                self._residency.want(url, reply["loads"], reply["used"])
            if reply["suspect"] and self._probing is None and self._engine is not None:
                # In a separate task, because heartbeats must continue while a busy engine responds slowly.
                self._probing = asyncio.create_task(self._works(self._engine), name="suspect-probe")
                self._probing.add_done_callback(lambda _: self._wake.set())
            elif self._probing is not None and self._probing.done():
                cleared, self._probing = self._probing.result(), None
                if cleared:
                    continue
                self.end(Observed.FAILED, self._fruitless(self._engine))
            # Not asyncio.wait_for: on Python 3.11 it can swallow a cancellation.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._wake.wait()

    def _saw_load(self, load: int, waiting: int, background: int | None = None) -> None:
        """Record in the time sheet that `load` slots are taken: `waiting` of them by requests that wait for an adapter, `background` of
        them by background work. If that is not known, all of them are if it was so before."""
        if background is not None:
            self._only_background = 0 < load <= background
        if self._ready:
            self._sheet.observe(phase_when_ready(load, waiting, load if self._only_background else 0))

    async def _works(self, engine: EngineProcess) -> bool:
        """Return whether the engine works: its counters of tokens increase, or it completes a probe. A busy engine is given time, but an
        engine whose server does not return its counters for MUTE_S seconds has failed."""
        before, answered = await self._tokens(engine.url), time.monotonic()
        probe = asyncio.create_task(self._probe(engine, STALL_S + PROBE_TIMEOUT_S), name="probe")
        try:
            while not probe.done() and engine.running:
                await asyncio.wait({probe}, timeout=BEAT_S)
                now = await self._tokens(engine.url)
                if before is not None and now is not None and now > before:
                    return True
                if now is not None:
                    before, answered = now if before is None else before, time.monotonic()
                elif time.monotonic() - answered > MUTE_S:
                    return False
            return probe.done() and probe.result()
        finally:
            probe.cancel()
            await asyncio.gather(probe, return_exceptions=True)

    async def _tokens(self, url: str) -> float | None:
        try:
            return await self._client.counted_tokens(url)
        except (EngineError, *CONNECTION_ERRORS):
            return None

    async def _moves(self, url: str) -> bool:
        """Return whether the engine's counters of tokens have increased since the last call. Used while Redis is down, when no other
        information is available."""
        before, self._counted = self._counted, await self._tokens(url)
        return before is not None and self._counted is not None and self._counted > before

    def _see(self, *, controller: bool, busy: bool) -> None:
        """Stop the replica if there has been neither a controller nor a running request for the orphan timeout."""
        now = time.monotonic()
        if controller:
            self._controller_seen = now
        if busy:
            self._busy_seen = now
        alone = now - self._controller_seen
        if alone > self._settings.orphan_timeout_s and now - self._busy_seen > self._settings.orphan_timeout_s:
            self.end(Observed.STOPPED, f"there was no controller for {alone:.0f} s, and no request")

    async def _listen(self) -> None:
        async for _ in self._scheduler.listen(replica_channel(self._id)):
            self._wake.set()

    async def _watch_desire(self, url: str) -> None:
        while True:
            with contextlib.suppress(Unavailable):
                row = await get_replica(self._db, self._id)
                if row is None or row.desired == Desired.STOPPED or row.observed == Observed.LOST:
                    self.end(Observed.STOPPED, "this replica is not desired any more")
                    return
                if self._state is Observed.READY and row.observed == Observed.STARTING:
                    # Postgres was unavailable when the state changed.
                    await observe(self._db, self._id, Observed.READY, url=url)
            await asyncio.sleep(BEAT_S)

    async def _watch_liveness(self, url: str) -> None:
        """Find an engine that makes no progress although its connections are open, because it is suspended or hangs."""
        tokens, moved, answered = None, time.monotonic(), time.monotonic()
        while True:
            await asyncio.sleep(min(STALL_S / 6, MUTE_S / 4))
            now = await self._tokens(url)
            if now is not None or self._state is Observed.STARTING:
                answered = time.monotonic()
            if self._state is Observed.STARTING or self._load == 0 or (now is not None and now != tokens):
                tokens, moved = now, time.monotonic()
            if time.monotonic() - moved > STALL_S or time.monotonic() - answered > MUTE_S:
                # The heartbeat starts a probe. Until the probe ends, this replica gets no new requests.
                self._doubted = True
                self._wake.set()
                tokens, moved, answered = now, time.monotonic(), time.monotonic()

    async def _watch_grammars(self, engine: EngineProcess) -> None:
        """Find an engine whose compilation of a grammar never ends. It still generates tokens for requests without a grammar, so the
        liveness check does not detect it."""
        while True:
            if reason := engine.stuck_grammar():
                self.end(Observed.FAILED, reason)
                return
            await asyncio.sleep(BEAT_S)

    async def _drain(self, engine: EngineProcess) -> None:
        """Accept no new work, and let running requests end within the drain timeout."""
        self._state = Observed.DRAINING
        deadline = time.monotonic() + self._settings.drain_timeout_s
        with contextlib.suppress(Unavailable):
            await observe(self._db, self._id, Observed.DRAINING)
        with contextlib.suppress(Unavailable):
            await self._drain_queue()
            # The load is -1 while Redis has lost its data and does not list this replica. Gateways then report what runs here.
            while self._load != 0 and time.monotonic() < deadline and engine.running:
                await asyncio.sleep(0.1)
                await self._drain_queue()

    async def _drain_queue(self) -> None:
        self._load = await self._scheduler.drain(self._model.id, self._id)
        if self._load >= 0:
            self._saw_load(self._load, 0)
