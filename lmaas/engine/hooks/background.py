"""Makes background requests give way inside vLLM's scheduler, so that interactive requests beside them wait for less.

vLLM's priorities order the requests that wait, and choose what is preempted when memory runs out. They change nothing about a step that
computes background requests beside the prompt of an interactive one, nor about an interactive request that waits because background ones
hold all memory. A background request has a priority above 0.
"""

import functools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("vllm.lmaas.hooks")

#: While there are interactive requests, one step computes at most this part of the usual number of tokens for background prompts.
PROMPT_PART = 24
#: The time after the last interactive request for which this is so.
RECENT_S = 5.0
#: The attributes of vLLM's scheduler that this hook uses.
NEEDED = (
    *("policy", "running", "waiting", "max_num_active_reqs", "max_num_scheduled_tokens", "num_spec_tokens", "block_size"),
    *("lora_config", "scheduler_config", "kv_cache_manager", "_preempt_request"),
)
_STATE = "_lmaas_background"


class GivingWay:
    """The state of one scheduler between its steps."""

    def __init__(self) -> None:
        #: The time (monotonic) at which an interactive request was seen last.
        self.interactive_at = float("-inf")
        #: The last step computed nothing, so pausing background requests does not help those that wait.
        self.in_vain = False
        #: The last step computed prompts.
        self.prompted = False


def install() -> None:
    """Wrap the step of vLLM's scheduler. Without `--scheduling-policy priority` it is unchanged."""
    from vllm.v1.core.sched.request_queue import SchedulingPolicy  # noqa: PLC0415 (only inside an engine)
    from vllm.v1.core.sched.scheduler import Scheduler  # noqa: PLC0415 (only inside an engine)

    schedule = Scheduler.schedule
    if hasattr(schedule, _STATE):
        return

    @functools.wraps(schedule)
    def schedule_giving_way(scheduler: Any, *args: Any, **options: Any) -> Any:
        if not hasattr(scheduler, _STATE):
            setattr(scheduler, _STATE, _begin(scheduler, SchedulingPolicy.PRIORITY))
        state = getattr(scheduler, _STATE)
        if state is None:
            return schedule(scheduler, *args, **options)
        with giving_way(scheduler, state, time.monotonic()):
            output = schedule(scheduler, *args, **options)
        state.in_vain = not output.total_num_scheduled_tokens
        state.prompted = output.total_num_scheduled_tokens > len(output.num_scheduled_tokens)
        return output

    setattr(schedule_giving_way, _STATE, True)  # so that it is wrapped once
    Scheduler.schedule = schedule_giving_way


def _begin(scheduler: Any, priority: object) -> GivingWay | None:
    """Return the state of a new scheduler, or None if its steps stay as they are."""
    if missing := [name for name in NEEDED if not hasattr(scheduler, name)]:
        log.warning("Background requests do not give way inside this vLLM: its scheduler has no %s.", ", ".join(missing))
        return None
    return GivingWay() if scheduler.policy is priority else None


@contextmanager
def giving_way(scheduler: Any, state: GivingWay, now: float) -> Iterator[None]:
    """Prepare the scheduler for one step, which is computed inside the block.

    If interactive requests have prompts to compute, background requests are paused for this step: those that run keep their memory. If
    sequence slots or memory are missing, the youngest background requests are preempted, and computed again later. In other steps, the
    tokens for background prompts are bounded while there are interactive requests, and while these generate, every second step at least
    computes no prompts.
    """
    running = scheduler.running
    background = [request for request in running if request.priority > 0]
    interactive = [request for request in running if request.priority <= 0]
    ready = _ready(scheduler)
    if interactive or ready:
        state.interactive_at = now
    if not background and not any(request.priority > 0 for request in scheduler.waiting):
        yield
        return
    prompts = bool(ready) or any(request.is_prefill_chunk for request in interactive)
    places, tokens = scheduler.max_num_active_reqs, scheduler.max_num_scheduled_tokens
    if prompts and not state.in_vain and _slots_suffice(scheduler, [*running, *ready]):
        _make_room(scheduler, background, interactive, ready, now)
        scheduler.running = interactive
        scheduler.max_num_active_reqs = min(places - len(background), len(interactive) + len(ready))
        try:
            yield
        finally:
            scheduler.running = scheduler.running + background
            scheduler.max_num_active_reqs = places
        return
    # Decoding requests come first, so that a bounded step never leaves them out.
    background.sort(key=lambda request: bool(request.is_prefill_chunk))
    scheduler.running = interactive + background
    recent = now - state.interactive_at < RECENT_S
    # A prompt that cannot be computed in pieces would never fit, and speculation needs several tokens for each request.
    if recent and not prompts and scheduler.scheduler_config.enable_chunked_prefill and not scheduler.num_spec_tokens:
        generating = sum(not request.is_prefill_chunk for request in running)
        piece = 0 if interactive and state.prompted and generating else max(1, tokens // PROMPT_PART)
        scheduler.max_num_scheduled_tokens = min(tokens, generating + piece)
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = tokens


def _ready(scheduler: Any) -> list[Any]:
    """Return the interactive requests that wait for nothing but their turn, and not for a grammar, for example."""
    waiting = scheduler.waiting
    if not waiting or waiting.peek_request().priority > 0:
        return []
    return [request for request in waiting if request.priority <= 0 and request.status.name in ("WAITING", "PREEMPTED")]


def _make_room(scheduler: Any, background: list[Any], interactive: list[Any], ready: list[Any], now: float) -> None:
    """Preempt the youngest background requests until the interactive ones have sequence slots, and memory for this step.

    While background requests are paused, vLLM would find only interactive ones to preempt.
    """
    uncomputed = (request.num_tokens - request.num_computed_tokens for request in (*interactive, *ready))
    blocks = sum(-(-tokens // scheduler.block_size) + 1 for tokens in uncomputed)
    pool = scheduler.kv_cache_manager.block_pool
    background.sort(key=lambda request: request.arrival_time)
    while background and (len(scheduler.running) + len(ready) > scheduler.max_num_active_reqs or pool.get_num_free_blocks() < blocks):
        youngest = background.pop()
        scheduler.running.remove(youngest)
        scheduler._preempt_request(youngest, now)


def _slots_suffice(scheduler: Any, requests: list[Any]) -> bool:
    """Return whether the engine has adapter slots for all these requests. When vLLM admits a request, it counts only the adapters that the
    same step computes, so paused ones would be forgotten."""
    if not scheduler.lora_config:
        return True
    used = {request.lora_request.lora_int_id for request in requests if request.lora_request}
    return bool(len(used) <= scheduler.lora_config.max_loras)
