"""The measure of fairness itself: VTC in its authors' form stays within its bound, taking turns by request does not."""

from collections import defaultdict
from collections.abc import Iterable

import pytest

from bench.vtc import WP, WQ, Calls, Differences, Request, history


class Plain(Calls):
    """A scheduler in a few lines: the waiting tenant with the smallest counter goes next, and service is added to its counter."""

    def __init__(self, pool: str, slots: int, adapter_slots: int) -> None:
        del pool, adapter_slots
        self.free = slots
        self.queued: list[Request] = []
        self.running: dict[str, int] = {}
        self.counters: dict[str, int] = defaultdict(int)

    async def submit(self, request: Request) -> bool:
        waiting = {each.tenant for each in self.queued}
        if waiting and request.tenant not in waiting:
            self.counters[request.tenant] = max(self.counters[request.tenant], min(self.counters[name] for name in waiting))
        self.queued.append(request)
        self.dispatch()
        return request.id in self.running

    async def renew(self, requests: Iterable[Request], *, progress: bool) -> set[str]:
        told = list(requests)
        for request in told:
            if progress:
                self.settle(request)
        return {request.id for request in told if request.id in self.running}

    async def release(self, request: Request) -> None:
        if request in self.queued:
            self.queued.remove(request)
            return
        self.settle(request)
        del self.running[request.id]
        self.free += 1
        self.dispatch()

    async def beat(self, resident: list[str]) -> None:
        pass

    def dispatch(self) -> None:
        while self.free and self.queued:
            request = min(self.queued, key=lambda each: self.counters[each.tenant])
            self.queued.remove(request)
            self.running[request.id] = 0
            self.free -= 1
            self.charge(request)

    def charge(self, request: Request) -> None:
        self.counters[request.tenant] += WP * request.prompt

    def settle(self, request: Request) -> None:
        self.counters[request.tenant] += WQ * (request.made - self.running[request.id])
        self.running[request.id] = request.made


class Turns(Plain):
    """A scheduler in which each request is a turn, whatever its length."""

    def charge(self, request: Request) -> None:
        self.counters[request.tenant] += 1

    def settle(self, request: Request) -> None:
        pass


SEEDS = range(20)


async def test_vtc_stays_within_its_bound() -> None:
    figures = [await history(Plain, seed, 1500) for seed in SEEDS]
    assert 0.1 < max(figures) <= 1


async def test_turns_by_request_do_not() -> None:
    figures = [await history(Turns, seed, 1500) for seed in SEEDS]
    assert max(figures) > 2


def test_a_difference_counts_only_while_both_wait() -> None:
    seen = Differences()
    seen.see({"a": 0, "b": 0}, {"a", "b"})
    seen.see({"a": 9, "b": 4}, {"a", "b"})
    assert seen.largest == 5
    seen.see({"a": 99, "b": 4}, {"a"})
    seen.see({"a": 99, "b": 4}, {"a", "b"})
    seen.see({"a": 99, "b": 6}, {"a", "b"})
    assert seen.largest == 5


@pytest.mark.parametrize(("swing", "largest"), [([3, -4], 7), ([-4, 3], 7), ([2, 5], 5)])
def test_the_largest_difference_is_over_any_part_of_the_time(swing: list[int], largest: int) -> None:
    seen = Differences()
    for difference in [0, *swing]:
        seen.see({"a": 10 + difference, "b": 10}, {"a", "b"})
    assert seen.largest == largest
