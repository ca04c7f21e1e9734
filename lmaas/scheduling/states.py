"""The states of tickets, and the other words that the functions in Redis share with their clients.

`layout.lua` has the same words under the same names, and a test compares the two.
"""

from enum import StrEnum

#: The code of a usage event that the scheduler writes for a ticket whose gateway has gone. Its status is UsageStatus.LOST.
GATEWAY_LOST = "gateway_lost"
#: The same for a ticket of durable work, whose event has the status UsageStatus.WASTED.
RUNNER_LOST = "runner_lost"


class TicketState(StrEnum):
    """The state of a ticket in Redis. Any ticket may also end, which deletes it."""

    #: The ticket waits for a slot.
    QUEUED = "queued"
    #: The ticket holds a slot on a replica that is still loading its adapter.
    LOADING = "loading"
    #: The ticket's gateway holds a lease.
    GRANTED = "granted"
    #: The ticket's replica was removed. Its gateway has yet to notice, and to request another one.
    REVOKED = "revoked"
    #: The slot of this background ticket was taken back for interactive work. Its owner has yet to end it.
    YIELDED = "yielded"
    #: The ticket was delivered as often as allowed, and each time its replica failed. Its gateway has yet to end it.
    FAILED = "failed"
    #: The ticket's adapter could not be loaded. Its gateway has yet to end it.
    LOAD_FAILED = "load_failed"


#: The states that a ticket leaves only by its end.
TERMINAL = frozenset({TicketState.FAILED, TicketState.LOAD_FAILED, TicketState.YIELDED})

TRANSITIONS: dict[TicketState, frozenset[TicketState]] = {
    TicketState.QUEUED: frozenset({TicketState.LOADING, TicketState.GRANTED}),
    # Queued again if its replica drains or is removed.
    TicketState.LOADING: frozenset({TicketState.GRANTED, TicketState.QUEUED, TicketState.LOAD_FAILED, TicketState.YIELDED}),
    # Queued again by its gateway, if its replica failed before the first byte.
    TicketState.GRANTED: frozenset({TicketState.QUEUED, TicketState.REVOKED, TicketState.FAILED, TicketState.YIELDED}),
    TicketState.REVOKED: frozenset({TicketState.QUEUED, TicketState.FAILED}),
    TicketState.FAILED: frozenset(),
    TicketState.YIELDED: frozenset(),
    TicketState.LOAD_FAILED: frozenset(),
}


class NoTicket(StrEnum):
    """The `state` of a report without a ticket: the reason why a submitted ticket was refused, or that the ticket is unknown."""

    #: The tenant's queue is full.
    REFUSED = "refused"
    #: The pool's queue is full.
    REFUSED_BY_POOL = "refused_by_pool"
    #: A limit of the tenant or the key is exceeded.
    LIMITED = "limited"
    #: The month's figures are missing. Submit the ticket again with them.
    UNSEEDED = "unseeded"
    #: The ticket has ended, or the server has lost its memory.
    UNKNOWN = "unknown"


#: The states that the submission of a ticket can return.
REFUSALS = frozenset({NoTicket.REFUSED, NoTicket.REFUSED_BY_POOL, NoTicket.LIMITED, NoTicket.UNSEEDED})


class WaitPhase(StrEnum):
    """The cause of a ticket's wait."""

    #: Engines are ready, but all slots are taken.
    BUSY = "busy"
    #: An engine is starting.
    STARTING = "starting"
    #: No engine is starting yet.
    ASKED = "asked"
    #: An engine loads the ticket's adapter. Used by clients only; for the functions, it is the state LOADING.
    LOADING = "loading"


class RetryReason(StrEnum):
    """The reason why a gateway returns a lease."""

    #: The engine failed.
    ENGINE = "engine"
    #: The engine does not have the adapter.
    ADAPTER = "adapter"


class Signal(StrEnum):
    """A message without content, apart from the retry reasons. Its receiver then reads the details from the queue."""

    #: To a replica: there is an adapter to load.
    LOAD = "load"
    #: To the controller: requests wait, and no replica is ready or starting.
    DEMAND = "demand"


class LimitName(StrEnum):
    """The limit that refused a ticket."""

    CONCURRENCY = "concurrency"
    REQUESTS = "requests"
    TOKENS = "tokens"
    #: This request alone may use more than a minute's tokens.
    REQUEST_TOKENS = "request_tokens"
    MONTH_TOKENS = "month_tokens"
    BUDGET = "budget"
