"""The requests that take part in a step of vLLM's scheduler, and the length of the step."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from lmaas.engine.hooks.background import NEEDED, PROMPT_PART, RECENT_S, GivingWay, giving_way

SLOTS, TOKENS, BLOCK = 4, 2400, 16


@dataclass
class Request:
    name: str
    priority: int = 0
    arrival_time: float = 0.0
    is_prefill_chunk: bool = False
    num_tokens: int = 20
    num_computed_tokens: int = 0
    lora: int = 0
    status: Any = field(default_factory=lambda: SimpleNamespace(name="WAITING"))

    @property
    def lora_request(self) -> Any:
        return SimpleNamespace(lora_int_id=self.lora) if self.lora else None


class Queue(list[Request]):
    """Waiting requests, in order of priority."""

    def __iter__(self) -> Iterator[Request]:
        return iter(sorted(super().__iter__(), key=lambda request: (request.priority, request.arrival_time)))

    def peek_request(self) -> Request:
        return next(iter(self))


class Scheduler:
    """The part of vLLM's scheduler that the hook uses. Its memory has `free` blocks, and each running request holds two."""

    def __init__(self, running: list[Request], waiting: list[Request], free: int = 100, max_loras: int | None = None) -> None:
        self.policy = "priority"
        self.running, self.waiting = running, Queue(waiting)
        self.max_num_active_reqs, self.max_num_scheduled_tokens = SLOTS, TOKENS
        self.num_spec_tokens, self.block_size = 0, BLOCK
        self.lora_config = SimpleNamespace(max_loras=max_loras) if max_loras else None
        self.scheduler_config = SimpleNamespace(enable_chunked_prefill=True)
        self.free, self.preempted = free, list[str]()
        self.kv_cache_manager = SimpleNamespace(block_pool=SimpleNamespace(get_num_free_blocks=lambda: self.free))

    def _preempt_request(self, request: Request, _: float) -> None:
        self.preempted.append(request.name)
        self.free += 2
        self.waiting.append(request)


def old(number: int, **more: Any) -> Request:
    """Return a background request; the one with the highest number is the youngest."""
    return Request(f"b{number}", 1, number, **more)


def step(scheduler: Scheduler, state: GivingWay | None = None, now: float = 100.0) -> tuple[list[str], int, int]:
    """Return the running requests that take part in a step, the number that may run after it, and the most tokens that it computes."""
    with giving_way(scheduler, state or GivingWay(), now):
        seen = [request.name for request in scheduler.running], scheduler.max_num_active_reqs, scheduler.max_num_scheduled_tokens
        scheduler.running.extend(scheduler.waiting[: max(0, scheduler.max_num_active_reqs - len(scheduler.running))])
    assert (scheduler.max_num_active_reqs, scheduler.max_num_scheduled_tokens) == (SLOTS, TOKENS)
    return seen


def test_an_interactive_prompt_is_computed_without_background_requests() -> None:
    scheduler = Scheduler([Request("i1"), old(1), old(2)], [Request("i2"), old(3)])
    # One more may run in this step: the interactive one. The background request that waits does not begin.
    assert step(scheduler) == (["i1"], 2, TOKENS)
    assert [request.name for request in scheduler.running] == ["i1", "i2", "b1", "b2"]
    assert scheduler.preempted == []


def test_so_is_the_rest_of_a_long_one() -> None:
    assert step(Scheduler([old(1), Request("i1", is_prefill_chunk=True)], [])) == (["i1"], 1, TOKENS)


@pytest.mark.parametrize("status", ["WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR", "WAITING_FOR_REMOTE_KVS"])
def test_what_waits_for_something_else_pauses_nothing(status: str) -> None:
    scheduler = Scheduler([old(1)], [Request("i1", status=SimpleNamespace(name=status))])
    assert step(scheduler)[:2] == (["b1"], SLOTS)


def test_without_background_requests_nothing_changes() -> None:
    assert step(Scheduler([Request("i1"), Request("i2", is_prefill_chunk=True)], [Request("i3")])) == (["i1", "i2"], SLOTS, TOKENS)


def test_the_youngest_background_requests_give_their_slots() -> None:
    scheduler = Scheduler([old(2), old(1), old(4), old(3)], [Request("i1"), Request("i2")])
    assert step(scheduler)[:2] == ([], 2)
    assert scheduler.preempted == ["b4", "b3"]
    assert [request.name for request in scheduler.running][:2] == ["i1", "i2"]
    assert len(scheduler.running) == SLOTS


def test_and_their_memory() -> None:
    # A prompt of 50 tokens needs four blocks of 16 and one for its completion.
    scheduler = Scheduler([old(1), old(2), old(3)], [Request("i1", num_tokens=50)], free=2)
    step(scheduler)
    assert scheduler.preempted == ["b3", "b2"]
    assert scheduler.free == 6


def test_memory_for_the_next_tokens_of_interactive_requests_is_kept() -> None:
    decoding = [Request(f"i{number}", num_tokens=33, num_computed_tokens=32) for number in range(2)]
    scheduler = Scheduler([*decoding, old(1), old(2)], [Request("i3", num_tokens=15)], free=5)
    step(scheduler)
    assert scheduler.preempted == ["b2"]


def test_interactive_requests_are_never_preempted() -> None:
    scheduler = Scheduler([Request(f"i{number}") for number in range(SLOTS)], [Request("late"), old(1)], free=0)
    assert step(scheduler) == ([f"i{number}" for number in range(SLOTS)], SLOTS, TOKENS)
    assert scheduler.preempted == []


def test_paused_adapters_keep_their_slots() -> None:
    running = [old(1, lora=1), old(2, lora=2)]
    assert step(Scheduler(list(running), [Request("i1", lora=3)], max_loras=2))[0] == ["b1", "b2"]
    assert step(Scheduler(list(running), [Request("i1", lora=2)], max_loras=2))[0] == []
    assert step(Scheduler(list(running), [Request("i1")], max_loras=2))[0] == []


def test_nothing_is_preempted_for_a_request_that_has_no_adapter_slot() -> None:
    scheduler = Scheduler([old(number, lora=number % 2 + 1) for number in range(SLOTS)], [Request("i1", lora=3)], max_loras=2)
    assert step(scheduler)[0] == [f"b{number}" for number in range(SLOTS)]
    assert scheduler.preempted == []


def test_a_pause_that_helps_nothing_ends() -> None:
    state = GivingWay()
    state.in_vain = True
    assert step(Scheduler([old(1)], [Request("i1")]), state)[0] == ["b1"]


def test_background_prompts_are_computed_in_pieces_while_there_are_interactive_requests() -> None:
    state = GivingWay()
    piece = TOKENS // PROMPT_PART
    # Requests that have their first token come before those whose prompts would fill the step.
    running = [old(1, is_prefill_chunk=True), old(2), Request("i1")]
    assert step(Scheduler(list(running), []), state, 100.0) == (["i1", "b2", "b1"], SLOTS, 2 + piece)
    # A step with prompts is followed by one that only generates. Where no interactive request generates, such a step would help none.
    state.prompted = True
    assert step(Scheduler(list(running), []), state, 100.0) == (["i1", "b2", "b1"], SLOTS, 2)
    assert step(Scheduler([old(1)], [old(2)]), state, 100.0 + RECENT_S / 2)[2] == 1 + piece
    assert step(Scheduler([old(1)], [old(2)]), state, 100.0 + RECENT_S)[2] == TOKENS


@pytest.mark.parametrize("change", [{"num_spec_tokens": 3}, {"scheduler_config": SimpleNamespace(enable_chunked_prefill=False)}])
def test_steps_that_need_more_tokens_are_not_bounded(change: dict[str, Any]) -> None:
    scheduler = Scheduler([Request("i1"), old(1)], [])
    vars(scheduler).update(change)
    assert step(scheduler)[2] == TOKENS


def test_the_stand_in_has_all_that_the_hook_needs() -> None:
    assert [name for name in NEEDED if not hasattr(Scheduler([], []), name)] == []
