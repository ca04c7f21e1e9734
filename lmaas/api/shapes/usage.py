"""Usage and the cost of goods sold."""

from datetime import date, datetime
from enum import StrEnum
from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from lmaas.api.shapes.common import Day, Paging, Query, Shape
from lmaas.states import Dimension, UsageDimension, UsageStatus, WorkClass

Owner = Annotated[
    str,
    Meta(
        max_length=200,
        description="The id or name of a tenant (of a deleted one, the id); without it, usage of all tenants and of the engines' probes.",
    ),
]
#: The name of usage that belongs to no tenant, in tables and CSV. No tenant can have it.
PROBES = "(probes)"


class Format(StrEnum):
    """The formats of a report."""

    JSON = "json"
    CSV = "csv"


FormatOfReport = Annotated[
    Format,
    Meta(description="`csv`, or `Accept: text/csv`, returns the whole report as a file; `limit` and `after` have no effect then."),
]


class ReportQuery(Paging, frozen=True, kw_only=True):
    """The days of a report (UTC), both inclusive, what it is about, and its format."""

    since: Day | None = None
    until: Day | None = None
    key: Annotated[str, Meta(max_length=100, description="The id of a key.")] | None = None
    model: Annotated[str, Meta(max_length=100, description="The name of a base model.")] | None = None
    adapter: Annotated[str, Meta(max_length=100, description="The name of an adapter, without a version.")] | None = None
    work: WorkClass | None = None
    format: FormatOfReport = Format.JSON


class UsageQuery(ReportQuery, frozen=True, kw_only=True):
    """The subject of a usage report, and the grouping of its lines."""

    after: Annotated[str, Meta(max_length=2000, description="The `last_id` of a page of this report: the page begins after it.")] | None = (
        None
    )
    by: Annotated[
        str, Meta(description=f"Some of {', '.join(UsageDimension)}, separated by commas.", examples=["day,model", "month,key"])
    ] = "day,model,adapter,work"


class OperatorUsageQuery(UsageQuery, frozen=True, kw_only=True):
    """The subject of a usage report, its tenant, and the grouping of its lines. With `adapter`, they are grouped by `tenant` as well,
    because an adapter is named within its tenant."""

    tenant: Owner | None = None
    by: Annotated[
        str, Meta(description=f"Some of {', '.join(UsageDimension)}, separated by commas.", examples=["day,tenant", "month,tenant,key"])
    ] = "day,tenant,model,adapter,work"


class EventQuery(ReportQuery, frozen=True, kw_only=True):
    """The requested events of the ledger."""

    status: UsageStatus | None = None
    request_id: Annotated[str, Meta(max_length=200)] | None = None


class OperatorEventQuery(EventQuery, frozen=True, kw_only=True):
    """The requested events of the ledger, and their tenant."""

    tenant: Owner | None = None


class CogsQuery(Query, frozen=True, kw_only=True):
    """The days of a report (UTC), both inclusive, how its lines are grouped, and its format."""

    since: Day | None = None
    until: Day | None = None
    format: FormatOfReport = Format.JSON
    by: Annotated[
        str, Meta(description=f"Some of {', '.join(Dimension)}, separated by commas.", examples=["day,tenant", "month,tenant,work"])
    ] = "day,tenant,adapter"


class CheckQuery(Query, frozen=True, kw_only=True):
    """The days (UTC) that are compared, both inclusive: by default yesterday and today."""

    since: Day | None = None
    until: Day | None = None


class Usage(Shape, tag_field="object", tag="usage", frozen=True, kw_only=True):
    """The usage of one group. Of the fields before `requests`, a line has those that it is grouped by: a tenant and a key have their id and
    their name. `tenant` is null for the engines' probes, `adapter` for the base model itself. `unpriced_requests` used tokens and cost
    nothing, because no price was set. Batches are background work."""

    day: date | UnsetType = UNSET
    month: Annotated[str, Meta(description="A month (UTC) such as 2026-11.")] | UnsetType = UNSET
    tenant_id: str | UnsetType | None = UNSET
    tenant: str | UnsetType | None = UNSET
    key_id: str | UnsetType | None = UNSET
    key: str | UnsetType | None = UNSET
    model: str | UnsetType = UNSET
    adapter: str | UnsetType | None = UNSET
    work: WorkClass | UnsetType = UNSET
    requests: int
    failed_requests: int
    unpriced_requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    run_ms: int
    charge_microusd: int


class OperatorUsage(Usage, tag_field="object", tag="usage", frozen=True, kw_only=True):
    """A group's usage with what only operators see: the tokens of attempts without a result, which are not charged, in all and by
    reason."""

    wasted_tokens: int
    waste: dict[str, int]


class UsageEvent(Shape, tag_field="object", tag="usage_event", frozen=True, kw_only=True):
    """The end of one request and its usage. `model` is the name that was requested, `adapter` the adapter's name without a version. Times
    are in ms, the charge in picodollars (10⁻¹² $)."""

    request_id: str
    created_at: datetime
    tenant_id: str | None
    key_id: str | None
    base_model: str
    model: str
    adapter: str | None
    adapter_version: int | None
    work: WorkClass
    status: UsageStatus
    code: str | None
    stream: bool
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_ms: int
    load_ms: int
    run_ms: int
    charge_picousd: int


class OperatorUsageEvent(UsageEvent, tag_field="object", tag="usage_event", frozen=True, kw_only=True):
    """A usage event with what only operators see: the engine's name of the adapter's version, and the replica."""

    engine_adapter: str | None
    replica_id: str | None


class UsageDifference(Shape, frozen=True, kw_only=True):
    """A group whose sums of a day differ from the ledger. `more` is what the ledger has more of each figure."""

    day: date
    table: str
    group: dict[str, str | None]
    more: dict[str, int]


class UsageCheck(Shape, tag_field="object", tag="usage_check", frozen=True, kw_only=True):
    """The comparison of the daily sums with the ledger: how many events were compared, and what differs, which should be nothing."""

    since: date
    until: date
    events: int
    differences: list[UsageDifference]


class EngineMs(Shape, frozen=True, kw_only=True):
    """Engine time, by what the engine did. In `background`, it did background work only."""

    total: int
    starting: int
    loading: int
    busy: int
    background: int
    idle: int


class CogsTotal(Shape, frozen=True, kw_only=True):
    """Engine time, its cost, the charge and the margin. `margin_ratio` is the margin's part of the charge; null without a charge.
    `unpriced_requests` used tokens and were charged nothing, because no price was set."""

    engine_ms: EngineMs
    cost_microusd: int
    charge_microusd: int
    margin_microusd: int
    margin_ratio: float | None
    unpriced_requests: int


class CogsLine(CogsTotal, frozen=True, kw_only=True):
    """One line with the requested groups. Time that no tenant used has the tenant null."""

    day: date | UnsetType = UNSET
    month: str | UnsetType = UNSET
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
