"""An engine's time by phase, in whole milliseconds. None is lost, and none is counted twice."""

from datetime import UTC, date, datetime

from lmaas.states import EnginePhase

DAY_MS = 86_400_000

#: A day (UTC), a phase, and the price of an engine-hour in it, in micro-dollars.
Span = tuple[date, EnginePhase, int]


def phase_when_ready(load: int, waiting: int, background: int) -> EnginePhase:
    """Return the phase of a ready engine with `load` occupied slots: `waiting` of them by requests that wait for an adapter, `background`
    of them by background work."""
    if load > waiting:
        return EnginePhase.BUSY if load > background else EnginePhase.BACKGROUND
    return EnginePhase.LOADING if load > 0 else EnginePhase.IDLE


class EngineMeter:
    """Adds up an engine's time by day, phase and price. `now` is the time of a monotonic clock, in seconds.

    An observation holds until the next one. The date is taken from the wall clock once, at the launch, so setting that clock later has no
    effect. `spans` are milliseconds, and their sum is the time from the launch to the last observation.
    """

    def __init__(self, launched_at: datetime, now: float, price: int) -> None:
        self._launched_ms = round(launched_at.timestamp() * 1000)
        self._launched = now
        self._counted_ms = 0
        self._phase, self._price = EnginePhase.STARTING, price
        self.spans: dict[Span, int] = {}

    def observe(self, now: float, *, phase: EnginePhase | None = None, price: int | None = None) -> None:
        """Count the time until `now`. After it, `phase` and `price` hold; None keeps the value before."""
        until_ms = int((now - self._launched) * 1000)
        while self._counted_ms < until_ms:
            # In steps that end at midnight.
            day, of_day_ms = divmod(self._launched_ms + self._counted_ms, DAY_MS)
            step_ms = min(until_ms - self._counted_ms, DAY_MS - of_day_ms)
            span = (datetime.fromtimestamp(day * (DAY_MS // 1000), UTC).date(), self._phase, self._price)
            self.spans[span] = self.spans.get(span, 0) + step_ms
            self._counted_ms += step_ms
        self._phase = self._phase if phase is None else phase
        self._price = self._price if price is None else price

    @property
    def total_ms(self) -> int:
        """Milliseconds from the launch to the last observation."""
        return self._counted_ms
