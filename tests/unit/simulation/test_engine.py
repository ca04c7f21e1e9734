"""The modelled engine: steps and their lengths, computed by hand."""

from dataclasses import replace
from functools import partial

import pytest

from lmaas.simulation.clock import Clock
from lmaas.simulation.engine import Engine
from tests.support.profiles import ROUND

Times = dict[tuple[str, int], float]


def run(*arrivals: tuple[float, int, int], step_sequence_s: float = 0.0, step_tokens: int = 1000) -> tuple[Times, Engine]:
    """Return the times at which each of the requests (time, prompt, completion) has its first token and all of them."""
    clock = Clock()
    seen: Times = {}
    engine = Engine(
        clock,
        replace(ROUND, step_sequence_s=step_sequence_s, step_tokens=step_tokens),
        on_first=lambda name: seen.__setitem__(("first", name), clock.now_s),
        on_done=lambda name: seen.__setitem__(("done", name), clock.now_s),
    )
    for name, (at_s, prompt, completion) in enumerate(arrivals):
        clock.at(at_s, partial(engine.begin, name, prompt, completion))
    clock.run()
    return seen, engine


def test_a_request_alone_takes_its_prompt_and_a_step_for_each_token() -> None:
    seen, engine = run((5.0, 100, 11))
    assert seen == {("first", 0): pytest.approx(5.2), ("done", 0): pytest.approx(6.2)}
    assert engine.busy_s == pytest.approx(1.2)


def test_one_token_is_the_first_and_the_last() -> None:
    seen, _ = run((0.0, 100, 1))
    assert seen["first", 0] == seen["done", 0] == pytest.approx(0.2)


def test_who_comes_later_joins_at_the_next_step_and_holds_up_the_others_by_its_prompt() -> None:
    # 0: prompt until 0.2, then steps until 0.3, 0.4, ... The other comes at 0.45: it waits for the step until 0.5, and that one's next
    # step has its 200 tokens besides: until 0.8.
    seen, engine = run((0.0, 100, 11), (0.45, 200, 2))
    assert seen["first", 1] == pytest.approx(0.8)
    assert seen["done", 1] == pytest.approx(0.9)
    # Eleven steps, and 0.3 s for prompts.
    assert seen["done", 0] == pytest.approx(1.4)
    assert engine.busy_s == pytest.approx(1.4)


def test_who_comes_at_the_end_of_a_step_does_not_wait_for_another() -> None:
    seen, _ = run((0.0, 100, 11), (0.5, 100, 1))
    assert seen["first", 1] == pytest.approx(0.7)


def test_a_step_is_longer_with_more_sequences() -> None:
    # Both prompts in one step until 0.3; then ten steps of 0.1 + 2 x 0.05.
    seen, _ = run((0.0, 100, 11), (0.0, 100, 11), step_sequence_s=0.05)
    assert seen["first", 0] == seen["first", 1] == pytest.approx(0.3)
    assert seen["done", 0] == seen["done", 1] == pytest.approx(2.3)


def test_a_long_prompt_takes_several_steps() -> None:
    # 2500 tokens: 1000, 1000, 500, each in a step of its own.
    seen, _ = run((0.0, 2500, 1))
    assert seen["first", 0] == pytest.approx(2.5 + 0.3)


def test_a_long_prompt_does_not_stop_who_runs() -> None:
    seen, _ = run((0.0, 100, 3), (0.1, 3000, 1))
    # Each step of the other's prompt generates a token for it: 1.1 s each; 999 tokens beside one that runs.
    assert seen["done", 0] == pytest.approx(0.2 + 2 * (0.1 + 0.999))


def test_what_is_done_so_far_is_known_at_any_time() -> None:
    clock, known = Clock(), []
    engine = Engine(clock, ROUND, on_first=lambda _: None, on_done=lambda _: None)
    clock.at(0.0, partial(engine.begin, 7, 100, 5))
    for at_s in (0.1, 0.2, 0.25, 0.301, 0.55):
        clock.at(at_s + 1e-6, lambda: known.append(engine.generated(7)))
    clock.run()
    assert known == [0, 1, 1, 2, 4]
