"""The records that the model is made of, and the constants of the scheduler."""

from dataclasses import dataclass, field
from typing import Any

from lmaas.scheduling.client import Ticket
from lmaas.scheduling.states import TicketState
from lmaas.states import Observed
from tests.integration.scheduling.model.limits import Reservation, Tokens

Reply = dict[str, Any]


@dataclass(frozen=True)
class Rules:
    """The scheduler's constants, by their names in Lua."""

    LEASE_MS: int = 6000
    STALE_MS: int = 5000
    GONE_MS: int = 30_000
    AWAY_MS: int = 3000
    PRESENT_MS: int = 10_000
    MAX_ATTEMPTS: int = 2
    TURN_MS: int = 2000
    START_MS: int = 20_000
    MAX_PASSES: int = 64
    RESERVE_PASSES: int = 32
    FAIR_TURNS: int = 2
    MAX_TURNS: int = 128
    MAX_TENANTS: int = 256
    MAX_LINE: int = 64
    MAX_DEPTH: int = 64
    MAX_VISITS: int = 512
    MAX_REAPED: int = 64
    MAX_CANDIDATES: int = 16
    MAX_GONE: int = 4
    MAX_KEPT: int = 16
    MAX_CROWDED: int = 4
    MAX_COUNTERS: int = 10_000
    MAX_YIELDS: int = 16
    MAX_TRIES: int = 4
    MAX_BACKGROUND_QUEUED: int = 10_000
    MAX_BACKGROUND_PLACED: int = 32


@dataclass
class Held:
    """A ticket that the scheduler has: queued → (loading →) granted, or an end that its gateway has yet to settle."""

    ticket: Ticket
    submitted: int
    attempts: int
    expires: int
    state: TicketState = TicketState.QUEUED
    #: Its place among all tickets, and among those of its tenant. The smallest goes first.
    turn: tuple[int, int] = (0, 0)
    place: tuple[int, str] = (0, "")
    #: The total number of placed tickets when a later ticket was first placed before this one.
    passed_at: int | None = None
    replica: str | None = None
    #: Which replica of this name.
    life: int = 0
    #: The replica that it lost.
    revoked: str | None = None
    #: The slots that it takes on its replica.
    slots: int = 0
    #: Its number among the background tickets that were placed.
    age: int = 0
    placed: int | None = None
    granted: int | None = None
    progress: Tokens | None = None
    reservations: list[Reservation] = field(default_factory=list)
    #: True if it was put back, in which case it runs even without room.
    restored: bool = False

    @property
    def came_back(self) -> bool:
        return self.turn[0] == 0

    @property
    def sequence(self) -> float:
        """The order in which it is taken from a replica that is lost."""
        came_back, number = self.turn
        return 0 if number == 0 else -1 / number if came_back == 0 else number

    def charged(self) -> int:
        """The tokens charged to its tenant's counter for it, before the division by the share."""
        if self.placed is None or self.state == TicketState.YIELDED:
            return 0
        return units(self.progress) if self.progress else self.ticket.prompt_tokens


@dataclass
class Replica:
    """One engine."""

    id: str
    #: Its number among all replicas, by which tickets know it.
    life: int
    since: int
    url: str = ""
    slots: int = 0
    adapter_slots: int = 0
    state: Observed = Observed.STARTING
    beat: int = 0
    #: The remaining time of its start by its supervisor's last heartbeat, and the time by which it is late.
    left: int | None = None
    late: int = 0
    suspect: bool = False
    #: The age of the latest background ticket that was placed there.
    latest: int = 0
    resident: set[str] = field(default_factory=set)
    #: Adapter → the place of its files.
    loading: dict[str, str] = field(default_factory=dict)
    #: Adapter → the time at which a ticket was last placed with it.
    used: dict[str, int] = field(default_factory=dict)


@dataclass
class Here:
    """The room that is kept on a replica for tickets that have waited too long: all of it, or adapter slots, emptied of `victims` for
    `holders`."""

    whole: bool = False
    victims: set[str] = field(default_factory=set)
    holders: set[str] = field(default_factory=set)


@dataclass
class Kept:
    """All room that is kept in a round, by replica, and the number of times that some was kept."""

    at: dict[str, Here] = field(default_factory=dict)
    keeps: int = 0

    def on(self, replica: str) -> Here:
        """Keep something on a replica."""
        self.keeps += 1
        return self.at.setdefault(replica, Here())


@dataclass
class Line:
    """The order of service of one class of tickets, interactive or background."""

    #: The counters of its tenants.
    counters: dict[str, float] = field(default_factory=dict)
    last_to_leave: str | None = None
    #: The least of the counters that were dropped.
    least_counter: float = 0.0
    #: For each waiting tenant, the number of tickets that it has queued since it began to wait.
    sequences: dict[str, int] = field(default_factory=dict)
    placed: int = 0


def units(tokens: Tokens) -> int:
    """Return the cost of tokens. A completion token costs twice a prompt token."""
    return tokens[0] + 2 * tokens[2]
