"""The scheduler's limits in plain Python, as a specification: every figure is a sum over reservations. See limits.lua."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any

from lmaas.scheduling.client import LimitedScope, Seed, Ticket
from lmaas.scheduling.states import LimitName, NoTicket

WINDOW_S = 60
ASK_AGAIN_MS, MAX_RETRY_MS = 15_000, 60_000
#: The used tokens: prompt, cached, completion.
Tokens = tuple[int, int, int]


def month_of(now: int) -> int:
    """Year x 100 + month (UTC)."""
    at = datetime.fromtimestamp(now / 1000, UTC)
    return at.year * 100 + at.month


def cost_of(ticket: Ticket, used: Tokens) -> int:
    """Return the cost in picodollars."""
    prompt, cached, completion = used
    return (prompt - cached) * ticket.prices[0] + cached * ticket.prices[1] + completion * ticket.prices[2]


@dataclass
class Reservation:
    """The part of one scope that one ticket takes: at first the most that it may use, then its actual usage."""

    second: int
    month: int
    requests: int
    tokens: int
    cost: int
    running: bool = True
    #: True if the month's figures include it. If not, the ledger has it, or is read when it ends.
    in_figures: bool = True
    #: True if only the month's figures include it.
    background: bool = False


class Seeded(IntEnum):
    """The state of a scope's figures of the month: not requested, requested from a gateway, which reads the ledger, or present."""

    NO = 0
    ASKED = 1
    YES = 2


@dataclass
class Scope:
    """A tenant or a key."""

    reservations: list[Reservation] = field(default_factory=list)
    seeded: Seeded = Seeded.NO
    asked: int = 0
    #: The average time from acceptance to end of its last few requests, in ms.
    turn_ms: int = 0
    seed: Seed = field(default_factory=lambda: Seed(0, 0, 0))

    def running(self) -> int:
        return sum(each.running for each in self.reservations)

    def seconds(self, now: int) -> dict[int, tuple[int, int]]:
        """Return the requests and tokens of each second, oldest first, until the second lies wholly more than a minute in the past."""
        found: dict[int, tuple[int, int]] = {}
        for each in sorted(self.reservations, key=lambda each: each.second):
            # Seconds in the future come from a clock that was set back.
            if each.second + WINDOW_S >= now // 1000 >= each.second and not each.background:
                requests, tokens = found.get(each.second, (0, 0))
                found[each.second] = requests + each.requests, tokens + each.tokens
        return found

    def minute(self, now: int, what: int) -> int:
        """Return the requests (`what` = 0) or tokens (1) of the last minute."""
        return sum(each[what] for each in self.seconds(now).values())

    def freed_in_ms(self, now: int, what: int, excess: int) -> int:
        """Return the time in ms until this many requests or tokens are older than the window."""
        for second, used in self.seconds(now).items():
            excess -= used[what]
            if excess <= 0:
                return (second + WINDOW_S + 1) * 1000 - now
        return WINDOW_S * 1000

    def reset_in_ms(self, now: int, what: int) -> int:
        """Return the time in ms until all requests or tokens are older than the window."""
        used = [second for second, each in self.seconds(now).items() if each[what] > 0]
        return (max(used) + WINDOW_S + 1) * 1000 - now if used else 0

    def month_figures(self, now: int) -> tuple[int, int]:
        """Return tokens and cost of this month: those of the ledger, those that have ended since, and those that are reserved."""
        month = month_of(now)
        counted = [each for each in self.reservations if each.in_figures and each.month == month]
        tokens, cost = (self.seed.tokens, self.seed.cost_picousd) if self.seed.month == month else (0, 0)
        return tokens + sum(each.tokens for each in counted), cost + sum(each.cost for each in counted)

    def begin_anew(self, now: int) -> None:
        """Request the figures from the ledger again: it has what ended before, and what ends from now on is counted here."""
        self.seeded, self.asked, self.seed = Seeded.ASKED, now, Seed(0, 0, 0)
        for each in self.reservations:
            each.in_figures = False


@dataclass
class Limits:
    """All scopes, of all pools."""

    #: The first guess of how long a request takes, in ms.
    turn_ms: int
    scopes: dict[str, Scope] = field(default_factory=dict)

    def take_seeds(self, now: int, seeds: Mapping[str, Seed]) -> None:
        """Store the figures of the month that came from the ledger."""
        for name, seed in seeds.items():
            scope = self.scopes.get(name)
            if scope is not None and scope.seeded == Seeded.ASKED and seed.month == month_of(now):
                scope.seeded, scope.seed = Seeded.YES, seed

    def reserve(self, now: int, ticket: Ticket, forced: bool) -> tuple[dict[str, Any] | None, dict[str, Any] | None, list[Reservation]]:
        """Return the refusal, or the remaining limits and the reservations. Tickets that are `forced` were accepted before the memory was
        lost."""
        if not ticket.limits:
            return None, None, []
        scopes = {limit.id: self.scopes.setdefault(limit.id, Scope(turn_ms=self.turn_ms)) for limit in ticket.limits}
        if not forced:
            by_month = [limit.id for limit in ticket.limits if limit.tokens_per_month is not None or limit.budget_per_month is not None]
            unseeded = [name for name in by_month if scopes[name].seeded != Seeded.YES]
            for name in unseeded:
                if scopes[name].seeded == Seeded.NO or abs(now - scopes[name].asked) > ASK_AGAIN_MS:
                    scopes[name].begin_anew(now)
            if unseeded:
                return {"state": NoTicket.UNSEEDED, "scopes": unseeded, "month": month_of(now)}, None, []
            refusals = [each for limit in ticket.limits for each in self._refusals(now, limit, ticket)]
            if refusals:
                # The first limit for which waiting does not help, else the one with the longest wait.
                worst = max(refusals, key=lambda each: each["retry_ms"] or float("inf"))
                return {"state": NoTicket.LIMITED, "left": self._left(now, ticket), **worst}, None, []
        tokens, cost = ticket.prompt_tokens + ticket.completion_tokens, cost_of(ticket, (ticket.prompt_tokens, 0, ticket.completion_tokens))
        made = []
        for limit in ticket.limits:
            background = ticket.background
            made.append(Reservation(now // 1000, month_of(now), 1, tokens, cost, running=not background, background=background))
            scopes[limit.id].reservations.append(made[-1])
        return None, self._left(now, ticket), made

    def _refusals(self, now: int, limit: LimitedScope, ticket: Ticket) -> list[dict[str, Any]]:
        scope, tokens = self.scopes[limit.id], ticket.prompt_tokens + ticket.completion_tokens
        cost = cost_of(ticket, (ticket.prompt_tokens, 0, ticket.completion_tokens))
        requests_used, tokens_used = scope.minute(now, 0), scope.minute(now, 1)
        month_tokens, month_cost = scope.month_figures(now)
        refusals: list[dict[str, Any]] = []
        if (most := limit.max_concurrent) is not None and scope.running() >= most:
            retry_ms = max(1, min(MAX_RETRY_MS, scope.turn_ms // max(1, scope.running())))
            refusals.append({"limit": LimitName.CONCURRENCY, "allowed": most, "retry_ms": retry_ms})
        if (most := limit.requests_per_minute) is not None and (excess := requests_used + 1 - most) > 0:
            retry_ms = scope.freed_in_ms(now, 0, excess)
            refusals.append({"limit": LimitName.REQUESTS, "allowed": most, "used": requests_used, "asked": 1, "retry_ms": retry_ms})
        if (most := limit.tokens_per_minute) is not None and tokens > most:
            refusals.append({"limit": LimitName.REQUEST_TOKENS, "allowed": most, "asked": tokens, "retry_ms": 0})
        elif (most := limit.tokens_per_minute) is not None and (excess := tokens_used + tokens - most) > 0:
            retry_ms = scope.freed_in_ms(now, 1, excess)
            refusals.append({"limit": LimitName.TOKENS, "allowed": most, "used": tokens_used, "asked": tokens, "retry_ms": retry_ms})
        if (most := limit.tokens_per_month) is not None and month_tokens + tokens > most:
            refusals.append({"limit": LimitName.MONTH_TOKENS, "allowed": most, "used": month_tokens, "asked": tokens, "retry_ms": 0})
        if (most := limit.budget_per_month) is not None and month_cost + cost > most * 1_000_000:
            refusals.append({"limit": LimitName.BUDGET, "allowed": most, "retry_ms": 0})
        return [each | {"scope": limit.scope} for each in refusals]

    def _left(self, now: int, ticket: Ticket) -> dict[str, list[int]]:
        """Return, for requests and tokens, the limit of the scope with the least left, the part that is left, and the ms until all of it is
        back."""
        left: dict[str, list[int]] = {}
        for what, name in enumerate(("requests", "tokens")):
            for limit in ticket.limits:
                most, scope = getattr(limit, f"{name}_per_minute"), self.scopes[limit.id]
                if most is None:
                    continue
                remaining = max(0, most - scope.minute(now, what))
                if name not in left or remaining < left[name][1]:
                    left[name] = [most, remaining, scope.reset_in_ms(now, what)]
        return left

    def settle(self, now: int, ticket: Ticket, submitted: int, made: list[Reservation], used: Tokens | None) -> None:
        """Replace the reservations by the actual usage. A ticket that used nothing returns its request, too.

        A ticket that ran for longer than a minute counts now for the minute, with its usage beyond the reservation.
        """
        for limit, each in zip(ticket.limits, made, strict=False):
            prompt, cached, completion = used or (0, 0, 0)
            excess = prompt + completion - each.tokens
            if excess > 0 and not each.background and not each.second + WINDOW_S >= now // 1000 >= each.second:
                late = Reservation(now // 1000, each.month, 0, excess, 0, running=False, in_figures=False)
                self.scopes[limit.id].reservations.append(late)
            each.tokens, each.cost = prompt + completion, cost_of(ticket, (prompt, cached, completion))
            each.requests = 1 if each.tokens > 0 else 0
            each.running, each.in_figures = False, True
            if used is not None and not each.background:
                scope = self.scopes[limit.id]
                scope.turn_ms += (max(0, now - submitted) - scope.turn_ms) // 8
