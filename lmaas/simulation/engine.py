"""A model of one engine, in steps that generate one token for each running sequence and process the prompts of new ones."""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lmaas.simulation.clock import Clock
from lmaas.simulation.profile import Profile


@dataclass(slots=True)
class Sequence:
    """One request on the engine. `finish` is the step after which it has all its tokens, once its prompt is processed."""

    name: int
    prompt_left: int
    completion_tokens: int
    finish: int = 0


@dataclass(slots=True)
class _Run:
    """Consecutive steps of the same length. At the end of the last one, the sequences in `begun` have their first token."""

    number: int
    began_s: float
    step_s: float
    steps: int
    begun: list[Sequence]


class Engine:
    """Continuous batching: a new request joins at the next step, and a finished one leaves after its last step.

    It accepts every request; the scheduler decides how many run at once. `on_first` and `on_done` are called with the name of a sequence
    when it has its first token and all its tokens.
    """

    def __init__(self, clock: Clock, profile: Profile, on_first: Callable[[int], None], on_done: Callable[[int], None]) -> None:
        self._clock, self._profile = clock, profile
        self._on_first, self._on_done = on_first, on_done
        self._arrived: list[Sequence] = []
        #: The running sequences, ordered by the step after which they finish.
        self._running: list[tuple[int, int]] = []
        self._finish: dict[int, Sequence] = {}
        self._steps = 0
        self._run: _Run | None = None
        self._runs = 0
        self._planning = False
        #: The seconds in which at least one sequence ran.
        self.busy_s = 0.0

    def begin(self, name: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Accept a request."""
        self._arrived.append(Sequence(name, prompt_tokens, completion_tokens))
        if self._planning:
            return
        if self._run is None:
            # Other requests that arrive at the same time join the same step.
            self._planning = True
            self._clock.after(0, self._go_on)
        elif self._run.steps > 1:
            # It joins after the current step.
            run = self._run
            steps = max(1, math.ceil((self._clock.now_s - run.began_s) / run.step_s - 1e-9))
            if steps < run.steps:
                self._begin_run(run.began_s, run.step_s, steps, [])

    def generated(self, name: int) -> int:
        """Return the number of tokens that a request has."""
        sequence = self._finish.get(name)
        if sequence is None:
            return 0
        run = self._run
        done = 0 if run is None or run.begun else int((self._clock.now_s - run.began_s) / run.step_s + 1e-9)
        return sequence.completion_tokens - max(0, sequence.finish - self._steps - done)

    def _begin_run(self, began_s: float, step_s: float, steps: int, begun: list[Sequence]) -> None:
        self._runs += 1
        self._run = _Run(self._runs, began_s, step_s, steps, begun)
        self._clock.at(began_s + step_s * steps, partial(self._end_run, self._runs))

    def _end_run(self, number: int) -> None:
        run = self._run
        if run is None or run.number != number:
            return  # it was aborted
        self._run, self._planning = None, True
        self._steps += run.steps
        self.busy_s += run.steps * run.step_s
        for sequence in run.begun:
            sequence.finish = self._steps + sequence.completion_tokens - 1
            self._finish[sequence.name] = sequence
            heapq.heappush(self._running, (sequence.finish, sequence.name))
            self._on_first(sequence.name)
        while self._running and self._running[0][0] <= self._steps:
            _, name = heapq.heappop(self._running)
            del self._finish[name]
            self._on_done(name)
        self._go_on()

    def _go_on(self) -> None:
        """Plan the steps until the next change."""
        self._planning = False
        profile = self._profile
        step_s = profile.step_s + profile.step_sequence_s * len(self._running)
        if not self._arrived:
            if self._running:
                self._begin_run(self._clock.now_s, step_s, self._running[0][0] - self._steps, [])
            return
        room = max(1, profile.step_tokens - len(self._running))
        taken, begun = 0, []
        for sequence in self._arrived:
            part = min(sequence.prompt_left, room - taken)
            sequence.prompt_left -= part
            taken += part
            if sequence.prompt_left == 0:
                begun.append(sequence)
            if taken == room:
                break
        del self._arrived[: len(begun)]
        self._begin_run(self._clock.now_s, step_s + taken / profile.prefill_tokens_per_s, 1, begun)
