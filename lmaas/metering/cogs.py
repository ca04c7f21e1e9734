"""The cost of goods sold (COGS): engine time, allocated to the tenants that used the engines.

Pure. Every millisecond ends in exactly one line, so the lines' sums are the engines' own. A millisecond at a price is a whole number of
the unit `cost` is kept in, 1/3,600,000 micro-dollar, so the sums of money are exact as well; they are rounded only to be shown.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any, TypeVar

from lmaas.metering.pricing import PICOUSD_PER_MICROUSD
from lmaas.states import Dimension, EnginePhase, WorkClass
from lmaas.store.engine_time import Charge, Consumer, EngineTime, Work

K = TypeVar("K", bound=Hashable)

#: The fields that lines are grouped by unless others are given.
DIMENSIONS = (Dimension.DAY, Dimension.TENANT, Dimension.ADAPTER)
MS_PER_HOUR = 3_600_000


@dataclass(slots=True)
class Line:
    """The cost and the charge of one consumer on one day. `cost` is in 1/3,600,000 micro-dollars, `charge` in picodollars. `unpriced`
    counts requests that used tokens and cost nothing, because no price was set."""

    ms: dict[EnginePhase, int] = field(default_factory=lambda: dict.fromkeys(EnginePhase, 0))
    cost: int = 0
    charge: int = 0
    unpriced: int = 0

    def add(self, other: "Line") -> None:
        """Add another line to this one."""
        for phase, ms in other.ms.items():
            self.ms[phase] += ms
        self.cost += other.cost
        self.charge += other.charge
        self.unpriced += other.unpriced

    @property
    def total_ms(self) -> int:
        """Milliseconds of all phases."""
        return sum(self.ms.values())


@dataclass(frozen=True, slots=True)
class Shown:
    """A line for display, with money in micro-dollars. Fields that the lines are not grouped by are None. A month is its first day."""

    day: date | None
    consumer: Consumer | None
    ms: dict[EnginePhase, int]
    cost_microusd: int
    charge_microusd: int
    unpriced_requests: int = 0

    @property
    def margin_microusd(self) -> int:
        """The charge less the cost."""
        return self.charge_microusd - self.cost_microusd

    @property
    def margin_ratio(self) -> float | None:
        """The gross margin as a part of the charge, to four places; None if nothing is charged."""
        return round(self.margin_microusd / self.charge_microusd, 4) if self.charge_microusd else None


@dataclass(frozen=True, slots=True)
class Report:
    """The lines, their sum, and the engines' time: `engine_ms` is `allocated_ms` + `unallocated_ms`."""

    lines: list[Shown]
    total: Shown
    engine_ms: int
    allocated_ms: int
    unallocated_ms: int


def apportion(total: int, weights: Mapping[K, int]) -> dict[K, int]:
    """Divide `total` into whole parts in proportion to `weights`, by largest remainder. Of equal remainders the earlier one is rounded up.

    The parts add up to `total`. `weights` must not be all zero.
    """
    whole = sum(weights.values())
    parts = {key: total * weight // whole for key, weight in weights.items()}
    left = total - sum(parts.values())
    for key in sorted(weights, key=lambda key: -(total * weights[key] % whole))[:left]:
        parts[key] += 1
    return parts


class _Shares:
    """The shares of the consumers of one engine in its time, by day."""

    def __init__(self) -> None:
        self._run: dict[date, dict[Consumer, int]] = {}
        self._load: dict[date, dict[Consumer, int]] = {}
        #: The engine's own time by day and phase.
        self._engine: dict[date, dict[EnginePhase, int]] = {}

    def add_work(self, work: Work) -> None:
        for weights, ms in ((self._run, work.run_ms), (self._load, work.load_ms)):
            if ms > 0:
                of_day = weights.setdefault(work.day, {})
                of_day[work.consumer] = of_day.get(work.consumer, 0) + ms

    def add_time(self, time: EngineTime) -> None:
        phases = self._engine.setdefault(time.day, {})
        phases[time.phase] = phases.get(time.phase, 0) + time.ms

    def of(self, day: date, phase: EnginePhase) -> dict[Consumer, int] | None:
        """Return the weights of the consumers, None if the engine has done no work."""
        if phase is EnginePhase.LOADING and day in self._load:
            return self._load[day]
        if not self._run:
            return None
        nearest = max((other for other in self._run if other <= day), default=min(self._run))
        background = {who: ms for who, ms in self._run[nearest].items() if who.work is WorkClass.BACKGROUND}
        interactive = {who: ms for who, ms in self._run[nearest].items() if who.work is not WorkClass.BACKGROUND}
        if phase is EnginePhase.BACKGROUND:
            return background or interactive
        if phase is not EnginePhase.BUSY or not background or not interactive:
            return interactive or background
        # Background work runs while the engine is busy and while it has nothing else to do, in proportion to these times.
        spent = self._engine[day]
        busy, alone = max(1, spent[EnginePhase.BUSY]), spent.get(EnginePhase.BACKGROUND, 0)
        return {who: ms * (busy + alone) for who, ms in interactive.items()} | {who: ms * busy for who, ms in background.items()}


def allocate(times: Sequence[EngineTime], work: Iterable[Work]) -> dict[tuple[date, Consumer], Line]:
    """Allocate engine time by day and consumer.

    - Loading is allocated in proportion to the time that requests waited for a load.
    - Time in which only background work ran is allocated in proportion to the time that background work ran.
    - Busy time is allocated in proportion to the time that all work ran then. Background work is taken to run evenly over the time in which
      the engine is busy and the time in which only background work runs.
    - Starting and idle time is allocated in proportion to the time that interactive requests ran, because they are what keeps engines warm;
      on an engine without any, in proportion to the time that background work ran.

    Each is of the same engine and day. On a day without work, the shares are those of the last earlier day that had some (an engine idles
    after its work), else of the next day (it started for that work). So the costs of a past day do not change later. An engine that never
    had a request is allocated to no tenant. Attempts that were wasted count as work of those whose work it was.
    """
    shares: dict[str, _Shares] = defaultdict(_Shares)
    # Sorted, so that remainders do not depend on the order of the database.
    for one in sorted(work, key=lambda one: (one.replica_id, one.day, *_order(one.consumer))):
        shares[one.replica_id].add_work(one)
    for time in times:
        shares[time.replica_id].add_time(time)
    lines: dict[tuple[date, Consumer], Line] = defaultdict(Line)
    for time in times:
        weights = shares[time.replica_id].of(time.day, time.phase) or {Consumer(None, None, time.base_model, None, None): 1}
        for consumer, ms in apportion(time.ms, weights).items():
            line = lines[time.day, consumer]
            line.ms[time.phase] += ms
            line.cost += ms * time.price
    return dict(lines)


def report(times: Sequence[EngineTime], work: Iterable[Work], charges: Iterable[Charge], by: Iterable[Dimension] = DIMENSIONS) -> Report:
    """Return cost and charge, grouped by some of DIMENSIONS, newest day first.

    The money of the lines is rounded so that it adds up to the total, which is rounded once.
    """
    lines = allocate(times, work)
    unallocated_ms = sum(line.total_ms for (_, consumer), line in lines.items() if consumer.tenant_id is None)
    for charge in charges:
        line = lines.setdefault((charge.day, charge.consumer), Line())
        line.charge += charge.picousd
        line.unpriced += charge.unpriced
    by = frozenset(by)
    groups: dict[tuple[date | None, Consumer | None], Line] = defaultdict(Line)
    for (day, consumer), line in lines.items():
        groups[_period(day, by), _grouped(consumer, by)].add(line)
    keys = sorted(groups, key=lambda key: (-key[0].toordinal() if key[0] else 0, *_order(key[1])))
    costs = rounded([groups[key].cost for key in keys], MS_PER_HOUR)
    paid = rounded([groups[key].charge for key in keys], PICOUSD_PER_MICROUSD)
    whole = Line()
    for line in groups.values():
        whole.add(line)
    return Report(
        [Shown(*key, groups[key].ms, cost, charge, groups[key].unpriced) for key, cost, charge in zip(keys, costs, paid, strict=True)],
        Shown(None, None, whole.ms, sum(costs), sum(paid), whole.unpriced),
        engine_ms=sum(time.ms for time in times),
        allocated_ms=whole.total_ms - unallocated_ms,
        unallocated_ms=unallocated_ms,
    )


def rounded(values: Sequence[int], divisor: int) -> list[int]:
    """Divide each value by `divisor` and round up or down, so that the results add up to the rounded quotient of the sum."""
    parts = [value // divisor for value in values]
    left = (2 * sum(values) + divisor) // (2 * divisor) - sum(parts)
    for index in sorted(range(len(values)), key=lambda index: -(values[index] % divisor))[:left]:
        parts[index] += 1
    return parts


def _period(day: date, by: frozenset[Dimension]) -> date | None:
    """Return the day, the first day of its month, or None, whichever lines are grouped by."""
    if Dimension.DAY in by:
        return day
    return day.replace(day=1) if Dimension.MONTH in by else None


def _grouped(consumer: Consumer, by: frozenset[Dimension]) -> Consumer | None:
    """Return the consumer without what lines are not grouped by, None if they are grouped by nothing of it."""
    work = consumer.work if Dimension.WORK in by else None
    if Dimension.ADAPTER in by:
        return replace(consumer, work=work)
    model = consumer.base_model if Dimension.MODEL in by else ""
    if Dimension.TENANT in by:
        return Consumer(consumer.tenant_id, consumer.tenant, model, None, work)
    return Consumer(None, None, model, None, work) if Dimension.MODEL in by or Dimension.WORK in by else None


def _order(consumer: Consumer | None) -> tuple[Any, ...]:
    """Return the sort key: by tenant, with no tenant last, then base model, adapter and work, the base model itself first."""
    if consumer is None:
        return ()
    names = (consumer.tenant or "", consumer.tenant_id or "", consumer.base_model, consumer.adapter or "")
    return (consumer.tenant is None, *names, consumer.work is None, consumer.work or "")
