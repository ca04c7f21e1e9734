"""One pool on a virtual clock: the real queue and the real autoscaler, over modelled engines.

Gateway, controller and supervisors are reduced to their calls of the scheduler's functions.
"""

import json
import math
from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lmaas.scheduling.client import CONTROL_CHANNEL, Beat, Bounds, Ticket, gateway_channel, replica_channel
from lmaas.scheduling.states import REFUSALS, TicketState
from lmaas.simulation.clock import Clock
from lmaas.simulation.engine import Engine
from lmaas.simulation.profile import Profile
from lmaas.simulation.queue import Queue
from lmaas.simulation.scaling import Scaling
from lmaas.simulation.tally import Span, Tally
from lmaas.simulation.trace import Request
from lmaas.states import Observed
from lmaas.types import TokenCounts

#: The interval of the controller's ticks, the supervisors' heartbeats and the gateways' renewals.
TICK_S = 1.0
LOADS_AT_ONCE = 4
GATEWAY = "simulated"


@dataclass(slots=True)
class _Replica:
    id: str
    launched_s: float
    engine: Engine
    state: Observed = Observed.STARTING
    #: True once the controller stops the replica, which then no longer counts as desired.
    stopping: bool = False
    resident: set[str] = field(default_factory=set)
    loading: set[str] = field(default_factory=set)
    requests: int = 0
    start_ms: int | None = None


@dataclass(slots=True)
class _Open:
    """A request that has not ended."""

    request: Request
    ticket: Ticket
    replica: _Replica | None = None
    granted_s: float = 0.0
    first_s: float = 0.0


class Pool:
    """The replicas of one base model. Requests are submitted at their time, and their results are in the tally."""

    def __init__(
        self, name: str, clock: Clock, queue: Queue, scaling: Scaling, profile: Profile, tally: Tally, *, max_queued: int, deadline_s: float
    ) -> None:
        self._name, self._clock, self._queue, self._scaling, self._profile = name, clock, queue, scaling, profile
        self._tally, self._bounds, self._deadline_s = tally, Bounds(max_queued, max_queued), deadline_s
        self._open: dict[str, _Open] = {}
        self._replicas: dict[str, _Replica] = {}
        self._started = 0
        self._ticks = 0
        self._ticking = False
        self._stats: dict[str, Any] = {}
        self._called_s = self._active_s = clock.now_s
        self._hearing = False
        for _ in range(scaling.policy.min_replicas):
            # An engine that is always on has started before the trace begins.
            replica = self._launch_now()
            replica.state = Observed.READY
            self._beat(replica)

    # The gateway

    def submit(self, name: str, request: Request) -> None:
        """Submit a request that arrives."""
        if self._clock.now_s - self._called_s >= TICK_S:
            # Supervisors have sent heartbeats since the last event, without effect.
            self._beat_all()
        if not any(replica.state is Observed.READY for replica in self._replicas.values()):
            self._tally.cold_requests += 1
        ticket = Ticket(
            id=name,
            pool=self._name,
            tenant=request.tenant,
            gateway=GATEWAY,
            adapter=request.adapter,
            source=request.adapter,
            weight=1,
            event="{}",
            prompt_tokens=request.prompt_tokens,
            completion_tokens=request.completion_tokens,
        )
        opened = self._open[name] = _Open(request, ticket)
        self._active_s = self._clock.now_s
        report = self._queue.ask(self._queue.submit(ticket, self._bounds))
        if report["state"] in REFUSALS:
            del self._open[name]
            self._tally.refused += 1
            return
        if report["state"] == TicketState.GRANTED:
            self._grant(opened, report["replica"])
        elif self._deadline_s > 0:
            self._clock.after(self._deadline_s, partial(self._expire, name))
        self._hear()
        self._keep_ticking()

    def _expire(self, name: str) -> None:
        opened = self._open.get(name)
        if opened is None or opened.replica is not None:
            return
        del self._open[name]
        self._tally.expired += 1
        self._queue.ask(self._queue.release(opened.ticket, "", None))
        self._hear()

    def _grant(self, opened: _Open, replica: str) -> None:
        opened.replica, opened.granted_s = self._replicas[replica], self._clock.now_s
        opened.replica.requests += 1
        opened.replica.engine.begin(int(opened.ticket.id), opened.request.prompt_tokens, opened.request.completion_tokens)

    def _first(self, name: int) -> None:
        opened = self._open[str(name)]
        opened.first_s = self._clock.now_s

    def _done(self, name: int) -> None:
        opened, now_s = self._open.pop(str(name)), self._clock.now_s
        request, tally = opened.request, self._tally
        if opened.replica is not None:
            opened.replica.requests -= 1
        tally.completed += 1
        tally.prompt_tokens += request.prompt_tokens
        tally.completion_tokens += request.completion_tokens
        tally.ttft_s.append(opened.first_s - request.at_s + self._profile.overhead_s)
        tally.total_s.append(now_s - request.at_s + self._profile.overhead_s)
        self._active_s = tally.last_s = now_s
        used = TokenCounts(request.prompt_tokens, 0, request.completion_tokens)
        self._queue.ask(self._queue.release(opened.ticket, "", round((now_s - opened.granted_s) * 1000), used))
        self._hear()

    def _renewal(self) -> Coroutine[Any, Any, Any]:
        progress = []
        for opened in self._open.values():
            made = opened.replica.engine.generated(int(opened.ticket.id)) if opened.replica is not None else 0
            progress.append((opened.ticket.id, TokenCounts(opened.request.prompt_tokens, 0, made) if made else None))
        return self._queue.renew(self._name, progress)

    def _hear(self) -> None:
        """Handle the scheduler's messages, each of which may cause more."""
        if self._hearing:
            return
        self._hearing = True
        self._called_s = self._clock.now_s
        while messages := self._queue.take_messages():
            for channel, text in messages:
                if channel == gateway_channel(GATEWAY):
                    self._hear_gateway(json.loads(text))
                elif channel == CONTROL_CHANNEL:
                    self._clock.after(0, self._tick_pool)
                else:
                    for replica in list(self._replicas.values()):
                        if channel == replica_channel(replica.id):
                            self._beat(replica)
        self._hearing = False

    def _hear_gateway(self, news: dict[str, object]) -> None:
        opened = self._open.get(str(news["id"]))
        if opened is not None and news["event"] == TicketState.GRANTED and opened.replica is None:
            self._grant(opened, str(news["replica"]))

    # The controller

    def _keep_ticking(self) -> None:
        # From now on, tick every second, regardless of earlier plans.
        if not self._ticking or not self._replicas:
            self._ticking = True
            self._ticks += 1
            self._clock.after(TICK_S, partial(self._tick, self._ticks))

    def _tick(self, number: int) -> None:
        if number != self._ticks:
            return  # it was planned anew
        if self._open:
            beating = self._beating()
            calls = (self._renewal(), *map(self._heartbeat, beating), self._queue.stats(self._name))
            _, *replies, self._stats = self._queue.ask_all(*calls)
            for replica, reply in zip(beating, replies, strict=True):
                self._load(replica, reply)
            self._hear()
            self._decide()
        else:
            self._tick_pool()
        quiet_s = 0.0 if self._open else self._quiet_s()
        # Nothing can change until the next request or for this time, so ticks without effect are skipped.
        self._ticking = quiet_s is not None
        if quiet_s is not None:
            self._ticks += 1
            self._clock.after(TICK_S * max(1, math.ceil(quiet_s / TICK_S)), partial(self._tick, self._ticks))

    def _quiet_s(self) -> float | None:
        policy = self._scaling.policy
        if not self._replicas:
            return self._scaling.quiet_s(self._clock.now_s - self._active_s)
        changing = any(replica.stopping or replica.state is not Observed.READY for replica in self._replicas.values())
        return None if policy.min_replicas == policy.max_replicas and not changing else 0.0

    def _tick_pool(self) -> None:
        """Do what the controller does for this pool in a tick."""
        if self._open or not self._stats:
            self._stats = self._queue.ask(self._queue.stats(self._name))
            self._hear()
        else:
            # The statistics are known without a call, because nothing waits or runs.
            self._stats |= {"queued": 0, "load": 0, "idle_ms": (self._clock.now_s - self._active_s) * 1000}
        self._decide()

    def _decide(self) -> None:
        wanted = [replica for replica in self._replicas.values() if not replica.stopping]
        desired = self._scaling.desired(self._stats, len(wanted), self._clock.now_s)
        # Fewest running requests first; among equals, replicas that are not ready, then the youngest.
        spare = sorted(wanted, key=lambda one: (one.requests, one.state is Observed.READY, -one.launched_s))
        for replica in spare[: max(0, len(wanted) - desired)]:
            replica.stopping = True
            self._clock.after(self._profile.notice_s, partial(self._drain, replica))
        room = self._scaling.policy.max_replicas - len(self._replicas)
        for _ in range(max(0, min(desired - len(wanted), room))):
            self._tally.starts += 1
            self._start()

    # The supervisors

    def _start(self) -> None:
        replica = self._launch_now(self._clock.now_s + self._profile.spawn_s)
        self._clock.at(replica.launched_s, self._beat_all)
        self._clock.at(replica.launched_s + self._profile.start_s, partial(self._warm, replica))

    def _launch_now(self, launched_s: float | None = None) -> _Replica:
        self._started += 1
        engine = Engine(self._clock, self._profile, self._first, self._done)
        launched = self._clock.now_s if launched_s is None else launched_s
        replica = _Replica(f"{self._name}-{self._started:04}", launched, engine)
        self._replicas[replica.id] = replica
        return replica

    def _warm(self, replica: _Replica) -> None:
        """After the engine's start, load the adapters that requests wait for, then become ready."""
        if replica.state is not Observed.STARTING:
            return
        awaited = self._beat(replica).get("warm") or {}
        replica.resident.update(sorted(awaited))
        rounds = -(-len(awaited) // LOADS_AT_ONCE)
        self._clock.after(rounds * self._profile.load_s, partial(self._ready, replica))

    def _ready(self, replica: _Replica) -> None:
        if replica.state is Observed.STARTING:
            replica.state, replica.start_ms = Observed.READY, round((self._clock.now_s - replica.launched_s) * 1000)
            self._beat(replica)
            self._hear()

    def _beating(self) -> list[_Replica]:
        """Return the replicas whose supervisors send heartbeats now."""
        there = [replica for replica in self._replicas.values() if replica.launched_s <= self._clock.now_s]
        return [replica for replica in there if replica.state is not Observed.STOPPED]

    def _beat_all(self) -> None:
        for replica in self._beating():
            self._beat(replica)

    def _heartbeat(self, replica: _Replica) -> Coroutine[Any, Any, dict[str, Any]]:
        profile = self._profile
        beat = Beat(replica.id, profile.slots, profile.adapter_slots, replica.state, sorted(replica.resident), start_ms=replica.start_ms)
        return self._queue.heartbeat(self._name, replica.id, beat)

    def _beat(self, replica: _Replica) -> dict[str, Any]:
        self._called_s = self._clock.now_s
        reply = self._queue.ask(self._heartbeat(replica))
        self._load(replica, reply)
        return reply

    def _load(self, replica: _Replica, reply: dict[str, Any]) -> None:
        """Load the adapters that the scheduler requests."""
        if replica.state is Observed.READY:
            for adapter in sorted(reply["loads"]):
                if adapter not in replica.loading:
                    replica.loading.add(adapter)
                    # Four load at a time; the others wait.
                    turns = -(-len(replica.loading) // LOADS_AT_ONCE)
                    self._clock.after(turns * self._profile.load_s, partial(self._loaded, replica, adapter, reply["used"]))

    def _loaded(self, replica: _Replica, adapter: str, used_ms_ago: dict[str, float]) -> None:
        replica.loading.discard(adapter)
        if replica.id not in self._replicas:
            return
        for other in sorted(replica.resident, key=lambda name: (-used_ms_ago.get(name, float("inf")), name)):
            if len(replica.resident) < self._profile.adapters_resident:
                break
            if self._queue.ask(self._queue.evict(self._name, replica.id, other)):
                replica.resident.discard(other)
        replica.resident.add(adapter)
        self._queue.ask(self._queue.loaded(self._name, replica.id, adapter))
        self._hear()

    def _drain(self, replica: _Replica) -> None:
        """Accept no new work, and stop the engine after the last request."""
        replica.state = Observed.DRAINING
        load = self._queue.ask(self._queue.drain(self._name, replica.id))
        self._hear()
        if load > 0:
            self._clock.after(0.1, partial(self._drain, replica))
            return
        # Its process is exiting.
        replica.state = Observed.STOPPED
        self._queue.ask(self._queue.deregister(self._name, replica.id))
        self._hear()
        self._clock.after(self._profile.stop_s, partial(self._end, replica))

    def _end(self, replica: _Replica) -> None:
        del self._replicas[replica.id]
        self._count(replica, self._clock.now_s)

    def _count(self, replica: _Replica, ended_s: float) -> None:
        # A replica that is stopped before its launch has a lifetime of zero.
        self._tally.spans.append(Span(replica.launched_s, max(replica.launched_s, ended_s)))
        self._tally.busy_s += replica.engine.busy_s

    def close(self, at_s: float) -> None:
        """End the trace at this time. Engines that still run are counted until then."""
        for replica in self._replicas.values():
            self._count(replica, at_s)
        self._replicas.clear()
