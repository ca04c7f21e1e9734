"""Tiers of tenants, and service tiers of requests: shares of the engines, and limits unless a tenant has its own."""

from dataclasses import dataclass, fields, replace

from lmaas.types import BatchLimits, Limits, Quota

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Tier:
    """The share and limits of a tenant. Tenants that wait at the same time are served in proportion to their shares.

    `max_files` and `max_file_bytes` are of all files that the tenant uploads, together. `max_batches` have not ended at once, and
    `max_batch_lines` of their lines wait. `max_background_responses` is the most responses in the background that have not ended,
    `max_webhooks` that of webhooks.
    """

    share: float
    limits: Limits
    max_files: int
    max_file_bytes: int
    max_batches: int
    max_batch_lines: int
    max_background_responses: int
    max_webhooks: int


@dataclass(frozen=True, slots=True)
class ServiceTier:
    """OpenAI's `service_tier`. A request counts `1 / share` of its tokens in the fair queue, goes before `head_start` earlier requests
    of its tenant (after, if negative), and its tokens cost `price_percent` of the usual price."""

    share: float
    head_start: int
    price_percent: int


TIERS = {
    "free": Tier(
        1.0,
        Limits(requests_per_minute=60, tokens_per_minute=40_000, max_concurrent=8, tokens_per_month=10_000_000, budget_per_month=None),
        max_files=1_000,
        max_file_bytes=5 * GIB,
        max_batches=5,
        max_batch_lines=50_000,
        max_background_responses=20,
        max_webhooks=5,
    ),
    "standard": Tier(
        4.0,
        Limits(),
        max_files=10_000,
        max_file_bytes=100 * GIB,
        max_batches=100,
        max_batch_lines=1_000_000,
        max_background_responses=200,
        max_webhooks=20,
    ),
    "premium": Tier(
        16.0,
        Limits(),
        max_files=100_000,
        max_file_bytes=1024 * GIB,
        max_batches=500,
        max_batch_lines=5_000_000,
        max_background_responses=1_000,
        max_webhooks=50,
    ),
}
DEFAULT_TIER = "standard"

_USUAL = ServiceTier(1.0, 0, 100)
#: OpenAI's `scale` is for customers who have bought capacity; here it is the usual tier.
SERVICE_TIERS = {
    "auto": _USUAL,
    "default": _USUAL,
    "scale": _USUAL,
    "priority": ServiceTier(2.0, 64, 200),
    "flex": ServiceTier(0.5, -64, 50),
}


def tier(name: str) -> Tier:
    """Return the tier of this name, or the default tier if the name is unknown."""
    return TIERS.get(name, TIERS[DEFAULT_TIER])


def file_quota(tier_name: str) -> Quota:
    """Return the quota of files of a tenant of this tier."""
    found = tier(tier_name)
    return Quota(found.max_files, found.max_file_bytes, f"its tier '{tier_name}'")


def batch_limits(tier_name: str) -> BatchLimits:
    """Return the limits of batches of a tenant of this tier."""
    found = tier(tier_name)
    return BatchLimits(found.max_batches, found.max_batch_lines, f"its tier '{tier_name}'")


def effective(own: Limits, tier_name: str) -> Limits:
    """Return a tenant's limits: its own where set, otherwise those of its tier."""
    usual = tier(tier_name).limits
    given = {field.name: value for field in fields(own) if (value := getattr(own, field.name)) is not None}
    return replace(usual, **given) if given else usual
