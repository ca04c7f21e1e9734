"""Positions and estimated waits of queued tickets. See outlook.lua."""

from lmaas.scheduling.states import TicketState, WaitPhase
from lmaas.states import Observed
from tests.integration.scheduling.model.data import Held, Replica, Reply
from tests.integration.scheduling.model.dispatch import Dispatch


class Outlook(Dispatch):
    """The expected wait of a ticket, as callers see it."""

    def estimate(self, now: int, position: int) -> Reply:
        """Estimate the wait of a ticket at this position. If something is late, its remaining time is estimated as the time by which it is
        late."""
        ready = [replica for replica in self.replicas.values() if replica.state == Observed.READY]
        starting = [replica for replica in self.replicas.values() if replica.state == Observed.STARTING]
        starting = sorted(starting, key=lambda each: (each.since, each.id))[: self.rules.MAX_CANDIDATES]
        usual = self.first_ms if self.start_ms is None else self.start_ms
        if slots := sum(replica.slots for replica in ready):
            phase, usual = WaitPhase.BUSY, self.run_ms
            elapsed = 0 if self.turn is None else now - self.turn
            left, late = self.left(usual, elapsed), max(0, elapsed - usual)
        elif starting:
            phase, slots = WaitPhase.STARTING, 16
            left, late = min(self.left_of_start(replica, usual, now) for replica in starting)
        else:
            phase, slots = WaitPhase.ASKED, 16
            elapsed = now - self.queue()[0].submitted if self.queue() else 0
            left, late = self.left(usual, elapsed), max(0, elapsed - usual)
            if (delay := self.delay_ms - (now - self.controller)) > 0:
                left, late = delay + usual, 0
        return {
            "wait_ms": left + (-(-position // slots) - 1) * self.run_ms,
            "late_ms": late,
            "phase": phase,
            "assumed": phase != WaitPhase.BUSY and self.start_ms is None,
        }

    def left_of_start(self, replica: Replica, usual: int, now: int) -> tuple[int, int]:
        """Return the remaining time of a start and its lateness, from its supervisor's report or by the clock."""
        if replica.left is None:
            return self.left(usual, now - replica.since), max(0, now - replica.since - usual)
        return max(min(1000, replica.left), replica.left - (now - replica.beat)), replica.late

    @staticmethod
    def left(usual: int, elapsed: int) -> int:
        return max(min(1000, usual), usual - elapsed, elapsed - usual)

    def position(self, held: Held) -> int:
        """Return the position in the order of service: behind tickets that came back, if the tenants' turns cost the same. The last tenants
        count with one ticket each."""
        front = [each for each in self.queue() if each.came_back]
        if held in front:
            return front.index(held) + 1
        tenant, order = held.ticket.tenant, self.tenants_waiting()
        own, turn = self.queue(tenant).index(held), order.index(tenant)
        if own == 0:
            return len(front) + turn + 1
        others = 0
        for at, each in enumerate(order):
            if each != tenant:
                others += min(len(self.queue(each)), own + (at < turn)) if at < self.rules.MAX_LINE else 1
        return len(front) + own + others + 1

    def report(self, now: int, held: Held) -> Reply:
        reply: Reply = {"state": held.state, "attempts": held.attempts}
        if held.state == TicketState.QUEUED:
            waiting = self.queue(background=True)
            position = waiting.index(held) + 1 if held.ticket.background else self.position(held)
            reply |= {"position": position} | self.estimate(now, position)
        if held.state == TicketState.GRANTED:
            reply |= self.lease(held)
        return reply
