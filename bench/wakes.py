"""Measures `batch_wakes`: the engine time of lines that arrive over a day and may wait for a day ÷ that of running each one at once.

The day is simulated: the decisions are the controller's own, over the simulation's model of an engine. No interactive request runs, so no
line can use an engine that is warm for others.
"""

import random
import statistics
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.frame import ROUNDS, Bar, Say, summary
from lmaas.control.autoscaler import Demand, Policy, ScalingState, decide
from lmaas.control.background import Backlog, Due, Throughput
from lmaas.simulation.clock import Clock
from lmaas.simulation.engine import Engine
from lmaas.simulation.generate import Day
from lmaas.simulation.profile import Profile

WAKES = "batch_wakes"
NAMES = (WAKES,)
DAY_S = 86_400.0
LINES = 1000
TICK_S, QUIET_TICK_S = 1.0, 10.0
#: Deadlines within this many seconds are one, as in the controller's query.
PERIOD_S = 900.0


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a batch: its time of arrival, and its tokens."""

    at_s: float
    prompt_tokens: int
    completion_tokens: int


def lines(seed: int, count: int = LINES) -> list[Line]:
    """Return lines at random times of a day, with tokens like those of the made-up day of `lmaas simulate`."""
    chance, sizes = random.Random(seed), Day(seed=seed).requests()  # noqa: S311 (a trace, not a secret)
    times = sorted(chance.uniform(0, DAY_S) for _ in range(count))
    return [Line(at_s, size.prompt_tokens, size.completion_tokens) for at_s, size in zip(times, sizes, strict=False)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The cost of the lines: engine-seconds, engines started, lines that ended, and the longest time until the end of one."""

    engine_s: float
    starts: int
    done: int
    longest_s: float


class OneEngine:
    """A pool of at most one engine, on which lines run as soon as it is ready. A subclass starts and stops it."""

    def __init__(self, clock: Clock, profile: Profile) -> None:
        self.clock, self.profile = clock, profile
        self.waiting: deque[int] = deque()
        self.running: set[int] = set()
        self.ready = self.wanted = False
        self.starts = 0
        self.engine_s = self.longest_s = 0.0
        self.done = 0
        #: The tokens of each line that has ended.
        self.done_tokens: dict[str, int] = {}
        self._lines: list[Line] = []
        self._engine = Engine(clock, profile, lambda _: None, self._end)
        self._launched_s: float | None = None

    def arrive(self, line: Line) -> None:
        """Add a line that waits."""
        self._lines.append(line)
        self.waiting.append(len(self._lines) - 1)
        self._fill()

    def start(self) -> None:
        """Start the engine."""
        self.wanted = True
        self.starts += 1
        self._launched_s = self.clock.now_s + self.profile.spawn_s
        self.clock.at(self._launched_s + self.profile.start_s, self._be_ready)

    def stop(self) -> None:
        """Stop the engine, on which nothing runs."""
        self.wanted = self.ready = False
        launched_s, self._launched_s = self._launched_s, None
        if launched_s is not None:
            self.engine_s += max(0.0, self.clock.now_s + self.profile.notice_s + self.profile.stop_s - launched_s)

    @property
    def waiting_lines(self) -> list[Line]:
        """The lines that wait."""
        return [self._lines[number] for number in self.waiting]

    def ended(self) -> None:
        """Act on the end of a line."""

    def _be_ready(self) -> None:
        self.ready = self.wanted
        self._fill()

    def _fill(self) -> None:
        while self.ready and self.waiting and len(self.running) < self.profile.slots:
            number = self.waiting.popleft()
            self.running.add(number)
            line = self._lines[number]
            self._engine.begin(number, line.prompt_tokens, line.completion_tokens)

    def _end(self, number: int) -> None:
        self.running.remove(number)
        self.done += 1
        line = self._lines[number]
        self.done_tokens[str(number)] = line.prompt_tokens + line.completion_tokens
        self.longest_s = max(self.longest_s, self.clock.now_s - line.at_s)
        self._fill()
        self.ended()


class AtOnce(OneEngine):
    """Runs each line when it arrives, and stops the engine when nothing is left to do. This wastes no time on an idle engine."""

    def arrive(self, line: Line) -> None:
        """Add a line, and start the engine for it."""
        super().arrive(line)
        if not self.wanted:
            self.start()

    def ended(self) -> None:
        """Stop after the last line."""
        if not self.running and not self.waiting:
            self.stop()


class Controlled(OneEngine):
    """Starts and stops the engine by the controller's decisions, once a second, and less often while there is none."""

    def __init__(self, clock: Clock, profile: Profile) -> None:
        super().__init__(clock, profile)
        self._policy = Policy(0, 1, 300.0, profile.slots)
        self._state, self._throughput = ScalingState(), Throughput()
        # The pool has been idle for a day.
        self._demand = partial(Demand, 0, 0, start_s=profile.start_s)

    def tick(self) -> None:
        """Decide."""
        now, waiting = self.clock.now_s, self.waiting_lines
        running, ready = len(self.running), int(self.ready)
        # Each line is a batch of its own.
        done = self.done_tokens.copy()
        self._throughput = self._throughput.observed(now, done, running=running, ready=ready, slots=self._policy.slots)
        backlog = Backlog(_dues(waiting, now), running=running, ready=ready, tokens_per_s=self._throughput.tokens_per_s)
        scale = decide(self._demand(DAY_S + now), self._policy, int(self.wanted), self._state, now, backlog)
        self._state = scale.state
        if scale.replicas > 0 and not self.wanted:
            self.start()
        elif scale.replicas == 0 and self.wanted:
            self.stop()
        if self.wanted or self.waiting or now < DAY_S:
            # Without an engine, only the time passes.
            self.clock.after(TICK_S if self.wanted else QUIET_TICK_S, self.tick)


def _dues(waiting: Sequence[Line], now: float) -> list[Due]:
    dues: dict[int, Due] = {}
    for line in waiting:
        due_s, tokens = line.at_s + DAY_S - now, line.prompt_tokens + line.completion_tokens
        period = int((line.at_s + DAY_S) / PERIOD_S)
        before = dues.get(period, Due(due_s, 0, 0))
        dues[period] = Due(before.due_s, before.lines + 1, before.tokens + tokens)
    return list(dues.values())


def simulate(kind: type[OneEngine], arriving: Sequence[Line], profile: Profile) -> Outcome:
    """Let the lines arrive at their times. Returns what they took once all have ended."""
    clock = Clock()
    pool = kind(clock, profile)
    for line in arriving:
        clock.at(line.at_s, partial(pool.arrive, line))
    if isinstance(pool, Controlled):
        clock.at(0.0, pool.tick)
    clock.run()
    return Outcome(pool.engine_s, pool.starts, pool.done, pool.longest_s)


async def measure(_model: Path, _folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the bar over several days."""
    if WAKES not in wanted:
        return
    profile, days = Profile(), list[dict[str, Any]]()
    for seed in range(ROUNDS):
        arriving = lines(seed)
        gathered, at_once = simulate(Controlled, arriving, profile), simulate(AtOnce, arriving, profile)
        ratio = gathered.engine_s / at_once.engine_s
        days.append({"seed": seed, "ratio": ratio, "gathered": gathered, "at_once": at_once})
        say(f"day {seed}: {gathered.engine_s:.0f} s with {gathered.starts} starts, at once {at_once.engine_s:.0f} s: {ratio:.3f}")
    detail = summary([day["ratio"] for day in days])
    yield Bar(WAKES, statistics.median(day["ratio"] for day in days), "<=", 0.2, {**detail, "days": days})
