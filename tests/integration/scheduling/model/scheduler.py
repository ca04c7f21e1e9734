"""The scheduler's functions in plain Python. A method takes the arguments of the method of Scheduler and returns its result, except for the
epoch.
"""

from collections.abc import Mapping, Sequence

from lmaas.scheduling.client import Beat, Bounds, Seed, Ticket
from lmaas.scheduling.states import NoTicket, RetryReason, Signal, TicketState
from lmaas.states import Observed
from tests.integration.scheduling.model.data import Held, Replica, Reply, Rules
from tests.integration.scheduling.model.limits import Tokens
from tests.integration.scheduling.model.outlook import Outlook


class Model(Outlook):
    """The scheduler of one pool."""

    def ask_for_replica(self) -> None:
        if self.queue() and all(replica.state == Observed.DRAINING or replica.suspect for replica in self.replicas.values()):
            self.said.append(("lmaas:control", Signal.DEMAND))

    def submit(
        self, now: int, ticket: Ticket, bounds: Bounds, *, waited_ms: int = 0, attempts: int = 0, seeds: Mapping[str, Seed] | None = None
    ) -> Reply:
        wall, now = now, self.begin(now)
        if self.reap(now):
            self.dispatch(now)
        if (known := self.get(ticket.id)) is not None:
            self.dispatch(now, ticket.id)
            return self.report(now, known)
        accepted_before = waited_ms > 0
        self.limits.take_seeds(wall, seeds or {})
        if not accepted_before and ticket.background:
            if len(self.queue(background=True)) >= self.rules.MAX_BACKGROUND_QUEUED:
                return {"state": NoTicket.REFUSED_BY_POOL, "wait_ms": self.run_ms}
        elif not accepted_before and len(self.queue(ticket.tenant)) >= bounds.max_queued:
            return {"state": NoTicket.REFUSED}
        elif not accepted_before and len(self.queue()) >= bounds.max_queued_pool:
            return {"state": NoTicket.REFUSED_BY_POOL, "wait_ms": self.estimate(now, len(self.queue()))["wait_ms"]}
        refused, left, made = self.limits.reserve(wall, ticket, accepted_before)
        if refused is not None:
            return refused
        held = Held(ticket, now - waited_ms, attempts, now + self.rules.LEASE_MS, reservations=made)
        self.enqueue(held, front=False)
        if not ticket.background:
            self.active = self.reserve.arrived = now
        self.dispatch(now, ticket.id)
        self.ask_for_replica()
        return self.report(now, held) | ({} if left is None else {"left": left})

    def release(self, now: int, ticket: Ticket, event: Reply | None, run_ms: int | None, used: Tokens | None) -> bool:
        now = self.begin(now)
        if event is not None:
            self.events.append(event)
        held = self.get(ticket.id)
        if held is not None:
            if run_ms is not None and not ticket.background:
                self.run_ms += (run_ms - self.run_ms) // 8
            self.forget(now, held, used)
        self.reap(now)
        self.dispatch(now)
        return held is not None

    def retry(self, now: int, ticket: Ticket, replica_id: str, reason: RetryReason, attempt: int) -> Reply:
        now = self.begin(now)
        held = self.get(ticket.id)
        if held is None:
            return {"state": NoTicket.UNKNOWN}
        if held.state in (TicketState.GRANTED, TicketState.REVOKED) and held.attempts == attempt:
            if (replica := self.replicas.get(replica_id)) is not None:
                if reason == RetryReason.ENGINE:
                    replica.suspect = True
                else:
                    replica.resident.discard(ticket.adapter)
                self.said.append((f"lmaas:replica:{replica_id}", reason))
            self.requeue(held, delivered=True)
        self.dispatch(now, ticket.id)
        self.ask_for_replica()
        return self.report(now, held)

    def renew(self, now: int, progress: Sequence[tuple[str, Tokens | None]]) -> Reply:
        now = self.begin(now)
        known = dict(self.tickets)
        for name, tokens in progress:
            if (held := self.get(name)) is not None:
                held.expires = now + self.rules.LEASE_MS
                if tokens is not None and held.state == TicketState.YIELDED:
                    held.progress = tokens
                elif tokens is not None and held.state in (TicketState.GRANTED, TicketState.REVOKED):
                    before, held.progress = held.charged(), tokens
                    self.charge(held, held.charged() - before)
        self.reap(now)
        self.dispatch(now)
        if any(name not in known or not known[name].ticket.background for name, _ in progress):
            self.active = now
        return {
            "tickets": [
                self.report(now, held) if (held := self.get(name)) is not None else {"state": NoTicket.UNKNOWN} for name, _ in progress
            ]
        }

    def restore(self, now: int, ticket: Ticket, replica_id: str, *, waited_ms: int, attempts: int) -> bool:
        wall, now = now, self.begin(now)
        replica = self.replicas.get(replica_id)
        if self.get(ticket.id) is not None:
            self.dispatch(now)
            return True
        if replica is None:
            return False
        made = self.limits.reserve(wall, ticket, True)[2]
        held = Held(ticket, now - waited_ms, attempts, now + self.rules.LEASE_MS, TicketState.GRANTED, reservations=made, restored=True)
        held.placed = held.granted = now
        self.tickets[ticket.id] = held
        self.reserve.arrived = self.reserve.arrived if ticket.background else now
        self.charge(held, ticket.prompt_tokens)
        self.hold(now, held, replica)
        self.dispatch(now)
        return True

    def heartbeat(self, now: int, replica_id: str, beat: Beat) -> Reply:
        now = self.begin(now)
        if replica_id not in self.replicas:
            self.lives += 1
            self.replicas[replica_id] = Replica(replica_id, self.lives, now, resident=set(beat.resident))
        replica = self.replicas[replica_id]
        if beat.state == Observed.READY and replica.state == Observed.STARTING:
            self.turn = now
            replica.resident |= set(beat.resident)
        if beat.start_ms is not None:
            self.start_ms = beat.start_ms
        if replica.state != Observed.DRAINING:
            replica.state = beat.state
        replica.url, replica.slots, replica.adapter_slots, replica.beat = beat.url, beat.slots, beat.adapter_slots, now
        replica.left, replica.late = beat.left_ms, beat.late_ms or 0
        replica.suspect = beat.suspect or (replica.suspect and not beat.cleared)
        self.reap(now)
        self.dispatch(now)
        return {
            "state": replica.state,
            "load": self.load(replica),
            "background": self.back(replica),
            "suspect": replica.suspect,
            "loads": replica.loading,
            "running": {adapter: len(self.loading_on(replica, adapter)) for adapter in replica.loading},
            "used": {adapter: now - at for adapter, at in replica.used.items()} if replica.loading else {},
            "controller": now - self.controller < self.rules.PRESENT_MS,
        } | ({"warm": self.awaited(replica.adapter_slots)} if replica.state == Observed.STARTING else {})

    def awaited(self, count: int) -> dict[str, str]:
        """Return the adapters that are needed first, as many as can run at once."""
        order = [held for background in (False, True) for held in self.in_order(background=background) if held.ticket.adapter]
        wanted = {held.ticket.adapter: held.ticket.source for held in reversed(order)}
        return {adapter: wanted[adapter] for adapter in list(dict.fromkeys(held.ticket.adapter for held in order))[:count]}

    def loaded(self, now: int, replica_id: str, adapter: str) -> int:
        now = self.begin(now)
        if (replica := self.replicas.get(replica_id)) is None:
            return 0
        waiting = self.loading_on(replica, adapter)
        replica.resident.add(adapter)
        replica.loading.pop(adapter, None)
        for held in waiting:
            self.move(held, TicketState.GRANTED)
            self.tell(held, TicketState.GRANTED, **self.grant(now, held))
        return len(waiting)

    def load_failed(self, now: int, replica_id: str, adapter: str, reason: str) -> int:
        now = self.begin(now)
        if (replica := self.replicas.get(replica_id)) is None:
            return 0
        failed = self.loading_on(replica, adapter)
        replica.loading.pop(adapter, None)
        for held in failed:
            self.take_back(held)
            self.move(held, TicketState.LOAD_FAILED)
            self.tell(held, TicketState.LOAD_FAILED, reason=reason)
        self.dispatch(now)
        return len(failed)

    def evict(self, now: int, replica_id: str, adapter: str) -> bool:
        now = self.begin(now)
        replica = self.replicas.get(replica_id)
        if replica is None or adapter in self.running(replica):
            return False
        replica.resident.discard(adapter)
        replica.used.pop(adapter, None)
        return True

    def drain(self, now: int, replica_id: str) -> int:
        now = self.begin(now)
        if (replica := self.replicas.get(replica_id)) is None:
            return -1
        loading = [held for adapter in replica.loading for held in self.loading_on(replica, adapter)]
        replica.state = Observed.DRAINING
        self.list_as_lost(loading)
        replica.loading = {}
        self.take_back_lost()
        latest = sorted((each for each in self.on(replica) if each.ticket.background), key=lambda each: -each.age)[: self.may_yield]
        for each in latest:
            held = self.get(each.ticket.id)
            assert held is not None
            if held.state == TicketState.GRANTED:
                self.put_back(held)
        self.dispatch(now)
        return self.load(replica)

    def deregister(self, now: int, replica_id: str) -> None:
        now = self.begin(now)
        if (replica := self.replicas.get(replica_id)) is not None:
            self.remove(replica)
        self.dispatch(now)
        self.ask_for_replica()

    def stats(self, now: int, delay_ms: int = 0, first_ms: int = Rules.START_MS) -> Reply:
        now = self.begin(now)
        self.reap(now)
        self.dispatch(now)
        self.controller, self.delay_ms, self.first_ms = now, delay_ms, first_ms
        replicas = {
            name: {
                "state": replica.state,
                "load": self.load(replica),
                "slots": replica.slots,
                "background": self.back(replica),
                "beat_ms": now - replica.beat,
                "resident": len(replica.resident),
                "running": len(self.running(replica)),
            }
            for name, replica in self.replicas.items()
        }
        return {
            "queued": len(self.queue()),
            "load": sum(self.front(replica) for replica in self.replicas.values()),
            "background": {
                "queued": len(self.queue(background=True)),
                "load": self.background_load(),
                "yields": self.yields,
                "reserve": self.reserved(now),
            },
            "replicas": replicas,
            "idle_ms": None if self.active is None else now - self.active,
            "run_ms": self.run_ms,
            "start_ms": self.rules.START_MS if self.start_ms is None else self.start_ms,
        }

    def read_room(self, now: int) -> Reply:
        """Return the result of `Scheduler.room`."""
        now = self.begin(now)
        self.reap(now)
        self.dispatch(now)
        ready = self.open_replicas(now)
        return {
            "ready": len(ready),
            "slots": sum(each.slots for each in ready),
            "room": 0 if self.queue() else max(0, self.background_room(now)),
            "queued": len(self.queue(background=True)),
        }
