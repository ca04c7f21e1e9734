"""Usage and the cost of goods sold."""

from datetime import date, datetime
from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from lmaas.api.shapes.common import Day, Paging, Query, Shape
from lmaas.states import Dimension, UsageStatus, WorkClass

Owner = Annotated[str, Meta(description="The id or name of a tenant; without it, usage of all tenants and of the engines' probes.")]


class Period(Query, frozen=True, kw_only=True):
    """The days of a report, both inclusive."""

    since: Day | None = None
    until: Day | None = None


class OperatorPeriod(Period, frozen=True, kw_only=True):
    """The days of a report, and whose usage it is about."""

    tenant: Owner | None = None


class OperatorEvents(Paging, frozen=True, kw_only=True):
    """Which part of the ledger is asked for."""

    tenant: Owner | None = None


class CogsQuery(Period, frozen=True, kw_only=True):
    """The days of a report, and how its lines are grouped."""

    by: Annotated[
        str, Meta(description=f"Some of {', '.join(Dimension)}, separated by commas.", examples=["day,tenant", "tenant,work"])
    ] = "day,tenant,adapter"


class Usage(Shape, tag_field="object", tag="usage", frozen=True, kw_only=True):
    """A tenant's use of one model on one day (UTC), by the class of the work: batches are background work. `tenant` is null for the
    engines' probes."""

    day: date
    tenant: str | None
    model: str
    work: WorkClass
    requests: int
    failed_requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    run_ms: int
    charge_microusd: int


class OperatorUsage(Usage, tag_field="object", tag="usage", frozen=True, kw_only=True):
    """A tenant's use with what only operators see: the tokens of attempts without a result, which are not charged, in all and by the reason
    why there is none."""

    wasted_tokens: int
    waste: dict[str, int]


class UsageEvent(Shape, tag_field="object", tag="usage_event", frozen=True, kw_only=True):
    """How one request ended and what it used. Times are in ms, the charge in picodollars (10⁻¹² $)."""

    request_id: str
    tenant_id: str | None
    key_id: str | None
    base_model: str
    model: str
    adapter_version: int | None
    status: UsageStatus
    code: str | None
    stream: bool
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_ms: int
    load_ms: int
    run_ms: int
    created_at: datetime
    charge_picousd: int
    work: WorkClass


class OperatorUsageEvent(UsageEvent, tag_field="object", tag="usage_event", frozen=True, kw_only=True):
    """A usage event with what only operators see: the engine's name of the adapter, and the replica."""

    adapter: str | None
    replica_id: str | None


class EngineMs(Shape, frozen=True, kw_only=True):
    """Engine time, by what the engine did. In `background`, it did background work only."""

    total: int
    starting: int
    loading: int
    busy: int
    background: int
    idle: int


class CogsTotal(Shape, frozen=True, kw_only=True):
    """Engine time, its cost, the charge and the margin. `margin_ratio` is the margin's part of the charge; null without a charge."""

    engine_ms: EngineMs
    cost_microusd: int
    charge_microusd: int
    margin_microusd: int
    margin_ratio: float | None


class CogsLine(CogsTotal, frozen=True, kw_only=True):
    """One line: who it is, as far as it was asked for. Time that no tenant used has the tenant null."""

    day: date | UnsetType = UNSET
    tenant_id: str | UnsetType | None = UNSET
    tenant: str | UnsetType | None = UNSET
    base_model: str | UnsetType | None = UNSET
    adapter: str | UnsetType | None = UNSET
    work: WorkClass | UnsetType | None = UNSET


class IdleCapacity(Shape, frozen=True, kw_only=True):
    """The time in which engines had nothing interactive to do, and how much of it background work used. `used_ratio` is null without
    such time."""

    ms: int
    used_ms: int
    used_ratio: float | None


class Reconciliation(Shape, frozen=True, kw_only=True):
    """The engines' own time, and how much of it the lines have."""

    engine_ms: int
    allocated_ms: int
    unallocated_ms: int


class Cogs(Shape, tag_field="object", tag="cogs", frozen=True, kw_only=True):
    """Engine time and money by the dimensions `by`."""

    by: list[Dimension]
    data: list[CogsLine]
    total: CogsTotal
    idle_capacity: IdleCapacity
    reconciliation: Reconciliation
