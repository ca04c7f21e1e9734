"""The limits that hold for a request, and the errors of those that refuse it."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from lmaas.admission.months import Months
from lmaas.admission.tiers import effective
from lmaas.errors import LmaasError, OverLimit, OverQuota, Unavailable
from lmaas.scheduling.client import Bounds, LimitedScope, Seed
from lmaas.scheduling.states import LimitName, NoTicket
from lmaas.types import Limits, Principal

NONE = Limits()
_OWNER = {"tenant": "Your account", "key": "This API key"}


@functools.lru_cache(10_000)
def limited_scopes(principal: Principal, *, rate_limited: bool = True) -> tuple[LimitedScope, ...]:
    """Return the scopes whose use is counted for this principal: its tenant and its key, if they have limits.

    Without `rate_limited`, only the limits per month hold.
    """
    of_tenant, of_key = effective(principal.limits, principal.tier), principal.key_limits
    if not rate_limited:
        of_tenant, of_key = _per_month(of_tenant), _per_month(of_key)
    scopes = [(principal.tenant_id or "", "tenant", of_tenant), (principal.key_id, "key", of_key)]
    return tuple(
        LimitedScope(
            id,
            scope,
            limits.requests_per_minute,
            limits.tokens_per_minute,
            limits.max_concurrent,
            limits.tokens_per_month,
            limits.budget_per_month,
        )
        for id, scope, limits in scopes
        if limits != NONE
    )


def _per_month(limits: Limits) -> Limits:
    return Limits(tokens_per_month=limits.tokens_per_month, budget_per_month=limits.budget_per_month)


@dataclass(frozen=True, slots=True)
class PrincipalLimits:
    """The limits under which a request of this principal is admitted."""

    months: Months
    principal: Principal
    bounds: Bounds

    async def seeds(self, scopes: Sequence[str], month: int) -> Mapping[str, Seed]:
        """Return what these scopes have used in the month by the ledger, for when Redis has no figures. Raises Unavailable."""
        return await self.months.seeds(self.principal.tenant_id or "", scopes, month)

    def refusal(self, report: Mapping[str, Any]) -> LmaasError:
        """Return the error for a ticket that was not accepted."""
        if report["state"] == NoTicket.REFUSED:
            message = (
                f"You have {self.bounds.max_queued} queued requests, the maximum for this tenant. Retry after 5 s, or raise max_queued."
            )
            return OverLimit(message, code="queue_full", retry_after_s=5)
        if report["state"] == NoTicket.REFUSED_BY_POOL:
            wait = max(1.0, report["wait_ms"] / 1000)
            message = f"The queue of this model is full: {self.bounds.max_queued_pool} requests wait. Retry after {math.ceil(wait)} s."
            return Unavailable(message, code="pool_queue_full", retry_after_s=wait)
        if report["state"] == NoTicket.UNSEEDED:
            return Unavailable("Your usage of this month is being counted. Retry after 1 s.", code="usage_unknown", retry_after_s=1)
        return _over(report)


def _over(report: Mapping[str, Any]) -> LmaasError:
    owner, allowed, asked = _OWNER[report["scope"]], report["allowed"], report.get("asked")
    headers = rate_limit_headers(report.get("left") or {})
    wait = report["retry_ms"] / 1000
    match report["limit"]:
        case LimitName.CONCURRENCY:
            message = f"{owner} has {allowed} open requests, the maximum. Retry after {max(1, math.ceil(wait))} s, or raise max_concurrent."
            return OverLimit(message, code="concurrency_limit_exceeded", retry_after_s=wait, extra_headers=headers)
        case LimitName.REQUESTS:
            message = f"{owner} may make {allowed} requests per minute. Retry after {wait:.1f} s, or raise requests_per_minute."
            return OverLimit(message, retry_after_s=wait, extra_headers=headers)
        case LimitName.TOKENS:
            message = (
                f"{owner} may use {allowed} tokens per minute: {report['used']} are used or reserved, and this request may use {asked}. "
                f"Retry after {wait:.1f} s, or raise tokens_per_minute."
            )
            return OverLimit(message, retry_after_s=wait, extra_headers=headers)
        case LimitName.REQUEST_TOKENS:
            message = (
                f"This request may use {asked} tokens, but {owner[0].lower()}{owner[1:]} may use {allowed} per minute. Shorten the prompt, "
                "lower max_tokens, or raise tokens_per_minute."
            )
            return OverQuota(message, code="rate_limit_exceeded", extra_headers=headers)
        case LimitName.MONTH_TOKENS:
            message = (
                f"{owner} may use {allowed} tokens per month: {report['used']} are used or reserved, and this request may use {asked}. "
                "Wait for the next month, or raise tokens_per_month."
            )
        case _:
            message = (
                f"{owner} has a budget of ${allowed / 1e6:g} per month, which this request could exceed. Wait for the next month, or raise "
                "budget_per_month."
            )
    return OverQuota(message, extra_headers=headers | {"retry-after": str(_seconds_to_next_month())})


def _seconds_to_next_month() -> int:
    now = datetime.now(UTC)
    following = datetime(now.year + now.month // 12, now.month % 12 + 1, 1, tzinfo=UTC)
    return int((following - now).total_seconds()) + 1


def rate_limit_headers(left: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return OpenAI's `x-ratelimit-*` headers. `left` maps `requests` and `tokens` to the limit, the rest and milliseconds to a reset."""
    lines = rate_limit_lines(left).decode().splitlines()
    return dict(line.split(": ", 1) for line in lines)


def rate_limit_lines(left: Mapping[str, Sequence[int]]) -> bytes:
    """Return the same headers as finished lines, which is quicker: nearly all responses have them."""
    lines = b""
    for name, (limit, remaining, reset_ms) in left.items():
        lines += _LINES[name] % (limit, remaining, reset_ms / 1000)
    return lines


_LINES = {
    name: f"x-ratelimit-limit-{name}: %d\r\nx-ratelimit-remaining-{name}: %d\r\nx-ratelimit-reset-{name}: %gs\r\n".encode()
    for name in ("requests", "tokens")
}
