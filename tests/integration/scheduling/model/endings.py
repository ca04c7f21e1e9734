"""The end of a ticket, and the loss of its replica, after which it waits again. See endings.lua and fleet.lua."""

from lmaas.scheduling.states import GATEWAY_LOST, RUNNER_LOST, TicketState
from lmaas.states import Observed, UsageStatus
from tests.integration.scheduling.model.data import Held, Replica, units
from tests.integration.scheduling.model.fairness import Fairness
from tests.integration.scheduling.model.limits import Tokens


class Endings(Fairness):
    """Settling, requeueing and giving up of tickets, and the removal of replicas."""

    def get(self, name: str) -> Held | None:
        """Return a ticket. If it has lost its place and no call has reached it yet, take it back first."""
        held = self.tickets.get(name)
        if held is not None and held.replica is not None and not self.stands(held, held.replica):
            self.displace(held)
        return held

    def stands(self, held: Held, replica_id: str) -> bool:
        replica = self.replicas.get(replica_id)
        drains = replica is not None and replica.state == Observed.DRAINING
        return replica is not None and replica.life == held.life and not (held.state == TicketState.LOADING and drains)

    def forget(self, now: int, held: Held, used: Tokens | None) -> None:
        """End a ticket: settle it to its usage, and free everything that it held."""
        if held.placed is not None and held.state != TicketState.YIELDED:
            self.charge(held, (units(used) if used else 0) - held.charged())
        del self.tickets[held.ticket.id]
        if held.state == TicketState.QUEUED:
            self.left_the_queue(held)
        self.limits.settle(now - self.offset, held.ticket, held.submitted - self.offset, held.reservations, used)
        self.active = self.active if held.ticket.background else now

    def take_back(self, held: Held) -> None:
        """Return the ticket's charge, because its client has received nothing."""
        self.charge(held, -held.charged())
        held.replica, held.slots, held.placed, held.granted, held.progress = None, 0, None, None, None

    def requeue(self, held: Held, delivered: bool) -> None:
        """Put a ticket back at the front of the queue, unless it has been delivered often enough."""
        held.attempts += delivered
        self.take_back(held)
        if delivered and held.attempts >= self.rules.MAX_ATTEMPTS:
            self.move(held, TicketState.FAILED)
        else:
            self.enqueue(held, front=True)

    def displace(self, held: Held) -> None:
        """Take a ticket from a replica that is removed or drains. One whose adapter was loading waits again. The gateway of one that ran is
        notified, and it holds nothing any more."""
        if held.state == TicketState.LOADING:
            self.requeue(held, delivered=False)
        else:
            self.move(held, TicketState.REVOKED)
            held.replica, held.slots, held.revoked = None, 0, held.replica
            self.tell(held, TicketState.REVOKED)

    def loading_on(self, replica: Replica, adapter: str) -> list[Held]:
        if replica.state == Observed.DRAINING:
            return []  # they are lost
        return [each for each in self.on(replica) if each.state == TicketState.LOADING and each.ticket.adapter == adapter]

    def list_as_lost(self, tickets: list[Held]) -> None:
        self.lives += 1
        if tickets:
            self.lost.append([each.ticket.id for each in sorted(tickets, key=lambda each: (each.sequence, each.ticket.id))])

    def take_back_lost(self) -> None:
        """Take back as many lost tickets as one call may."""
        while self.lost and self.budget:
            taken, self.lost[0] = self.lost[0][: self.budget], self.lost[0][self.budget :]
            for name in taken:
                self.get(name)
            self.budget -= len(taken)
            if not self.lost[0]:
                del self.lost[0]

    def remove(self, replica: Replica) -> None:
        """Remove a replica. Its tickets are lost."""
        tickets = self.on(replica)
        del self.replicas[replica.id]
        self.list_as_lost(tickets)
        self.take_back_lost()

    def reap(self, now: int) -> bool:
        """Return whether anything was removed because its owner had gone."""
        found = bool(self.lost)
        self.take_back_lost()
        if now < self.spare_until:
            return found
        lost = sorted((each.expires, name) for name, each in self.tickets.items() if each.expires <= now)[: self.budget]
        self.budget -= len(lost)
        for _, name in lost:
            self.give_up(now, name)
        gone = [replica for _, replica in sorted(self.replicas.items()) if now - replica.beat > self.rules.GONE_MS]
        for replica in gone[: self.rules.MAX_GONE]:
            self.remove(replica)
        return found or bool(lost or gone)

    def give_up(self, now: int, name: str) -> None:
        """End a ticket whose gateway is gone."""
        held = self.get(name)
        assert held is not None
        used = held.progress or (0, 0, 0)
        self.events.append(
            {
                "request_id": held.ticket.id,
                "status": UsageStatus.WASTED if held.ticket.durable else UsageStatus.LOST,
                "code": RUNNER_LOST if held.ticket.durable else GATEWAY_LOST,
                "prompt_tokens": used[0],
                "cached_tokens": used[1],
                "completion_tokens": used[2],
                "queue_ms": (now if held.placed is None else held.placed) - held.submitted,
                "load_ms": 0 if held.placed is None else (now if held.granted is None else held.granted) - held.placed,
                "run_ms": 0 if held.granted is None else now - held.granted,
                "replica_id": held.replica or held.revoked,
            }
        )
        self.forget(now, held, None if held.ticket.durable else used)
