"""The order of service: tenants by counter, tickets of a tenant by place. See fairness.lua."""

from collections.abc import Iterator

from lmaas.scheduling.states import TicketState
from tests.integration.scheduling.model.data import Held
from tests.integration.scheduling.model.state import State


class Fairness(State):
    """The order in which tenants and their tickets take turns."""

    def tenants_waiting(self, *, background: bool = False) -> list[str]:
        """Return the waiting tenants by counter. A tenant does not wait if only tickets that came back are in its queue."""
        tenants = {each.ticket.tenant for each in self.queue(background=background) if not each.came_back}
        return sorted(tenants, key=lambda tenant: (self.lines[background].counters.get(tenant, 0), tenant))

    def in_order(self, *, background: bool = False) -> Iterator[Held]:
        """Return the tickets of one round in the order of service, starting with those that came back."""
        order = [each for each in self.queue(background=background) if each.came_back]
        for tenant in self.tenants_waiting(background=background)[: self.rules.MAX_TENANTS]:
            order += self.queue(tenant, background=background)[: self.rules.MAX_DEPTH]
        yield from order[: self.rules.MAX_VISITS]

    def floor(self, *, background: bool) -> float:
        """Return the least counter of a tenant that begins to wait."""
        line, waiting = self.lines[background], self.tenants_waiting(background=background)
        if waiting:
            return line.counters.get(waiting[0], 0)
        return max(line.least_counter, line.counters.get(line.last_to_leave or "", 0))

    def charge(self, held: Held, amount: int) -> None:
        if amount:
            counters, tenant = self.lines[held.ticket.background].counters, held.ticket.tenant
            counters[tenant] = max(0.0, counters.get(tenant, 0) + amount / held.ticket.share)

    def enqueue(self, held: Held, front: bool) -> None:
        self.enqueued += 1
        tenant, background = held.ticket.tenant, held.ticket.background
        line, floor = self.lines[background], self.floor(background=background)
        if not front and not self.queue(tenant, background=background):
            line.sequences[tenant] = 0
            # Behind the tenants that wait already.
            behind = 0.001 if self.tenants_waiting(background=background) else 0
            line.counters[tenant] = max(line.counters.get(tenant, 0), floor + behind)
            if len(line.counters) > self.rules.MAX_COUNTERS:
                line.least_counter = self.floor(background=background)
                line.counters = {name: value for name, value in line.counters.items() if value >= line.least_counter}
        held.turn = (0 if front else 1, self.enqueued)
        if not front:
            line.sequences[tenant] += 1
            held.place = (line.sequences[tenant] - held.ticket.head_start, held.ticket.id)
        if held.state != TicketState.QUEUED:
            self.move(held, TicketState.QUEUED)
        held.replica, held.revoked, held.slots, held.placed, held.granted = None, None, 0, None, None
        held.passed_at = None
        self.tickets[held.ticket.id] = held

    def left_the_queue(self, held: Held) -> None:
        background = held.ticket.background
        if not held.came_back and not self.queue(held.ticket.tenant, background=background):
            self.lines[background].last_to_leave = held.ticket.tenant
