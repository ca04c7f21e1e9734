"""The engines that background work needs, such as the lines of batches: a pure function of its backlog, its deadlines, and what the pool's
engines have shown.

Background work runs on slots that interactive requests leave free. An engine starts for it only if a deadline requires one, or if enough
work has gathered to pay for the start. An engine that runs already stays until the work is done, because to stop it and to start another
one later would cost more.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

#: Tokens per second that one replica is assumed to process, until the pool has shown more. A low figure starts engines early.
DEFAULT_TOKENS_PER_S = 100.0
#: The part of the time before a deadline that is kept in reserve, for starts that fail and machines that are full: MARGIN_S, but at most
#: half of the time that is left.
MARGIN_S = 1800.0
#: The work may take this many times as long as estimated.
CAUTION = 1.25
#: A further replica is stopped only when the others have this part of a replica to spare, so that it is not started again and again.
RELEASE = 0.5
#: An engine that only background work needs is kept for this long after the last of it. Postgres counts each line until its end, so the
#: time only covers the moment between two batches.
QUIET_S = 2.0
#: If no background work runs on a ready engine for this long although some waits, engines do not help it: none is started or kept for it
#: for PAUSE_S.
STALLED_S = 60.0
PAUSE_S = 600.0
#: The engine time that is needed before the measured throughput counts, and the time after which a measurement counts for a third.
ENOUGH_ENGINE_S = 30.0
FADE_ENGINE_S = 600.0
#: Throughput is measured while background work has at least this part of the slots.
FILLED = 0.5


@dataclass(frozen=True, slots=True)
class Due:
    """Work that must be done in `due_s` seconds: its lines, and their estimated tokens."""

    due_s: float
    lines: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Backlog:
    """The background work of a pool that has not ended, in the order of its deadlines.

    `dues` are the lines that wait in Postgres, the first of them since `waited_s` seconds, `queued` and `running` (in slots) those that the
    scheduler has. `ready` is the number of replicas that take work, and `tokens_per_s` what one of them processes if it does nothing else;
    None as long as the pool has not shown it. Nothing runs the lines without a job runner.
    """

    dues: Sequence[Due] = ()
    queued: int = 0
    running: int = 0
    ready: int = 0
    tokens_per_s: float | None = None
    has_runner: bool = True
    waited_s: float = 0.0

    @property
    def lines(self) -> int:
        """The lines that wait in Postgres."""
        return sum(due.lines for due in self.dues)

    @property
    def tokens(self) -> int:
        """The estimated tokens of these lines."""
        return sum(due.tokens for due in self.dues)

    @property
    def present(self) -> bool:
        """True if there is any background work."""
        return bool(self.dues) or self.running > 0 or self.queued > 0

    @property
    def rate(self) -> float:
        """The tokens per second to calculate with."""
        return self.tokens_per_s or DEFAULT_TOKENS_PER_S

    @property
    def engine_s(self) -> float:
        """The estimated time for which the lines would keep one engine busy."""
        return self.tokens / self.rate


@dataclass(frozen=True, slots=True)
class BackgroundFigures:
    """The background work of a pool, for display: the `lines` that wait with their estimated `tokens`, the seconds until the earliest
    deadline, what the scheduler has (`queued`, `running` and `reserve` in slots, and how often it took a slot back), what a replica
    processes, and the replicas that only background work needs."""

    lines: int = 0
    tokens: int = 0
    due_s: int | None = None
    queued: int = 0
    running: int = 0
    reserve: int = 0
    put_back: int = 0
    tokens_per_s: float | None = None
    replicas: int = 0


@dataclass(frozen=True, slots=True)
class BackgroundState:
    """The state that one decision hands to the next: the replicas that background work needed, the last time at which there was any, the
    time since which it has not run although a replica is ready, and the end of a pause."""

    replicas: int = 0
    present_at: float | None = None
    stalled_since: float | None = None
    paused_until: float = -math.inf


@dataclass(frozen=True, slots=True)
class BackgroundNeed:
    """The replicas that background work needs besides the interactive `load` (in replicas), and the reason. `due` is True if a deadline
    requires them. `waits` describes the condition for which the work waits if it needs none."""

    replicas: int
    reason: str
    due: bool
    waits: str
    state: BackgroundState


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Other facts about the pool: its desired replicas, whether interactive requests wait or run and their usual load in replicas, the
    slots of a replica, the usual time of a start, how many times as long as a start an engine must be busy to be worth it, and the time
    after which one starts in any case."""

    current: int
    busy: bool
    load: float
    slots: int
    start_s: float
    worth_starts: float
    max_wait_s: float = math.inf


def background_need(backlog: Backlog, pool: Surroundings, state: BackgroundState, now: float) -> BackgroundNeed:
    """Return how many replicas the pool needs in all so that its background work is done in time and at little cost."""
    if not backlog.present:
        lingers = state.replicas > 0 and state.present_at is not None and now - state.present_at < QUIET_S
        replicas = min(pool.current, 1) if lingers else 0
        return BackgroundNeed(replicas, "background work has just ended", False, "", replace(state, replicas=replicas, stalled_since=None))
    if not backlog.has_runner and backlog.running == 0:
        waits = f"{_lines(backlog)} wait for a job runner (`lmaas jobs`), and none is there"
        return BackgroundNeed(0, "", False, waits, replace(state, replicas=0, present_at=now, stalled_since=None))
    state = _watched(backlog, pool.busy, state, now)
    if now < state.paused_until and backlog.running == 0:
        waits = f"no line has run for {STALLED_S:.0f} s on a ready engine; none is kept for them for {_words(state.paused_until - now)}"
        return BackgroundNeed(0, "", False, waits, replace(state, replicas=0))
    needed, latest_s = _deadlines(backlog, pool.start_s)
    most = math.ceil(pool.load) + max(1, math.ceil(backlog.lines / pool.slots))
    replicas, reason, due = 0, "", latest_s <= 0
    if due:
        # As many as the work needs besides the interactive requests. A slot's part of an engine at least, or it might never run.
        replicas = min(most, max(1, math.ceil(pool.load + max(needed, 1 / pool.slots))))
        if backlog.tokens_per_s is None:
            # First one of them shows what it does.
            replicas = min(replicas, math.ceil(pool.load) + 1)
        reason = f"a deadline requires {_count(replicas, 'replica')} now for {_lines(backlog)}"
    elif pool.current > 0:
        replicas, reason = 1, f"kept for {_lines(backlog)}"
    elif worth(backlog, pool):
        replicas, reason = 1, f"{_lines(backlog)} would keep an engine busy for {_words(backlog.engine_s)}, which pays for its start"
    elif backlog.dues and backlog.waited_s >= pool.max_wait_s:
        replicas, reason = 1, f"after {_words(backlog.waited_s)} without an engine, one starts for {_lines(backlog)}"
    kept = min(state.replicas, pool.current, most)
    if replicas < kept and pool.load + needed > kept - 1 - RELEASE:
        replicas, reason, due = kept, f"kept for the deadline of {_lines(backlog)}", True
    waits = "" if replicas else _waits(backlog, pool, latest_s)
    return BackgroundNeed(replicas, reason, due, waits, replace(state, replicas=replicas))


def worth(backlog: Backlog, pool: Surroundings) -> bool:
    """Return whether the work keeps an engine busy for so long that its start costs little in comparison."""
    return bool(backlog.dues) and backlog.engine_s >= pool.worth_starts * _overhead_s(pool)


def _overhead_s(pool: Surroundings) -> float:
    """Return the time that an engine spends on its start and its end."""
    return pool.start_s + QUIET_S


def _waits(backlog: Backlog, pool: Surroundings, latest_s: float) -> str:
    words = f"{_lines(backlog)} may run when an engine is warm"
    if backlog.dues:
        more_s = pool.worth_starts * _overhead_s(pool) - backlog.engine_s
        wait_s, why = min((latest_s, "for their deadline"), (pool.max_wait_s - backlog.waited_s, "when they have waited for long"))
        words += f"; one starts for them once {_words(more_s)} more of work has gathered, or in {_words(wait_s)}, {why}"
    return words


def _deadlines(backlog: Backlog, start_s: float) -> tuple[float, float]:
    """Return the replicas that the deadlines need from now on, which need not be a whole number, and the time until the latest start.

    The work with the earliest deadline is done first. So for each deadline, all the work up to it must be done in time.
    """
    needed, latest_s, tokens = 0.0, math.inf, 0
    for due in backlog.dues:
        tokens += due.tokens
        if due.due_s <= start_s:
            continue  # no start would be in time
        work_s = CAUTION * tokens / backlog.rate
        left_s = due.due_s - start_s
        latest_s = min(latest_s, left_s - MARGIN_S - work_s)
        needed = max(needed, work_s / max(left_s - MARGIN_S, left_s / 2, 1.0))
    return needed, latest_s


def _watched(backlog: Backlog, busy: bool, state: BackgroundState, now: float) -> BackgroundState:
    """Return the state with the time since which the work could run and does not, and with a pause if that is too long. While interactive
    requests have the slots, it may have to wait."""
    if backlog.running > 0 or backlog.ready == 0 or busy or now < state.paused_until:
        return replace(state, present_at=now, stalled_since=None)
    since = now if state.stalled_since is None else state.stalled_since
    if now - since >= STALLED_S:
        return replace(state, present_at=now, stalled_since=None, paused_until=now + PAUSE_S)
    return replace(state, present_at=now, stalled_since=since)


@dataclass(frozen=True, slots=True)
class Throughput:
    """The rate at which one replica of a pool processes background work: fading sums of tokens, and of the engine time for them.

    Tokens are those of the estimates, so that an estimate that is always too high or too low is corrected. `done` is the last reading: the
    tokens that are done of each batch.
    """

    tokens: float = 0.0
    engine_s: float = 0.0
    done: Mapping[str, int] = field(default_factory=dict)
    at: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """The tokens per second, None as long as too little was seen."""
        return self.tokens / self.engine_s if self.engine_s >= ENOUGH_ENGINE_S and self.tokens > 0 else None

    @classmethod
    def of(cls, tokens_per_s: object) -> "Throughput":
        """Return the state for a rate that an earlier controller stored. Anything else gives no measurement."""
        if isinstance(tokens_per_s, int | float) and not isinstance(tokens_per_s, bool) and 0 < tokens_per_s < math.inf:
            return cls(tokens_per_s * ENOUGH_ENGINE_S, ENOUGH_ENGINE_S)
        return cls()

    def observed(self, now: float, done: Mapping[str, int], *, running: int, ready: int, slots: int) -> "Throughput":
        """Return the state after a reading of the tokens that are done, by batch.

        Time in which background work has few of the slots does not count, because an engine does more with all of them, nor does the time
        until the first lines end.
        """
        reading = replace(self, done=done, at=now)
        if self.at is None or running < max(1.0, FILLED * ready * slots):
            return reading
        grown = sum(max(0, tokens - self.done.get(batch, 0)) for batch, tokens in done.items())
        if self.tokens == 0 and grown == 0:
            return reading
        passed_s = (now - self.at) * ready
        kept = math.exp(-passed_s / FADE_ENGINE_S)
        return replace(reading, tokens=self.tokens * kept + grown, engine_s=self.engine_s * kept + passed_s)


def _lines(backlog: Backlog) -> str:
    return _count(backlog.lines + backlog.running + backlog.queued, "line") + " of background work"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _words(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
