"""Compares the service that tenants get from a simulated engine, whose slots the real scheduler grants, with the bound that VTC proves.

"Fairness in Serving Large Language Models" (Sheng et al., OSDI'24): service is the weighted number of tokens, and two tenants that have
requests waiting all the time differ by no more than 2·max(wp·Linput, wq·M), where M is the most tokens that the running requests hold.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lmaas.scheduling.client import Beat, Bounds, Scheduler, Ticket
from lmaas.scheduling.states import TicketState
from lmaas.states import Observed
from lmaas.types import TokenCounts

#: The weights of a prompt token and of a completion token.
WP, WQ = 1, 2
SLOT_CHOICES = (2, 4, 8)
REPLICA = "engine"
_GATEWAY = "bench"


@dataclass(eq=False)
class Request:
    """A request that stops after `completion` tokens, although it may have allowed more. `made` of them are generated.

    Before it has run, the scheduler's estimate of its prompt is `guess` times the true length.
    """

    id: str
    tenant: str
    adapter: str
    prompt: int
    completion: int
    allowed: int
    guess: float = 1.0
    made: int = 0

    @property
    def held(self) -> int:
        """The number of tokens that the engine holds for the request."""
        return self.prompt + self.made if self.made else 0


class Calls:
    """The calls of a gateway and a supervisor to the scheduler, for one pool."""

    def __init__(self, scheduler: Scheduler, pool: str, slots: int, adapter_slots: int) -> None:
        self._scheduler, self._pool = scheduler, pool
        self._slots, self._adapter_slots = slots, adapter_slots
        self._tickets: dict[str, Ticket] = {}

    async def submit(self, request: Request) -> bool:
        """Queue a request. Returns whether it runs immediately."""
        # The scheduler gets estimates: the likely prompt length and the allowed completion. It has no access to the true lengths.
        ticket = Ticket(
            id=request.id,
            pool=self._pool,
            tenant=request.tenant,
            gateway=_GATEWAY,
            adapter=request.adapter,
            source="s",
            weight=1,
            event="{}",
            prompt_tokens=max(1, round(request.prompt * request.guess)),
            completion_tokens=request.allowed,
        )
        self._tickets[request.id] = ticket
        return bool((await self._scheduler.submit(ticket, Bounds(10_000, 10_000)))["state"] == TicketState.GRANTED)

    async def renew(self, requests: Iterable[Request], *, progress: bool) -> set[str]:
        """Keep requests alive and report their progress. Returns the ids of those that run."""
        told = [(request.id, TokenCounts(request.prompt, 0, request.made) if progress and request.made else None) for request in requests]
        reply = await self._scheduler.renew(self._pool, told)
        return {name for (name, _), report in zip(told, reply["tickets"], strict=True) if report["state"] == TicketState.GRANTED}

    async def release(self, request: Request) -> None:
        """Report the end of a request."""
        event = {"request_id": request.id, "prompt_tokens": request.prompt, "cached_tokens": 0, "completion_tokens": request.completion}
        await self._scheduler.release(
            self._tickets.pop(request.id), json.dumps(event), 100, TokenCounts(request.prompt, 0, request.completion)
        )

    async def beat(self, resident: list[str]) -> None:
        """Send a heartbeat of the engine."""
        await self._scheduler.heartbeat(
            self._pool, REPLICA, Beat("http://engine", self._slots, self._adapter_slots, Observed.READY, resident)
        )


@dataclass
class Kind:
    """The requests of a tenant: the maximum lengths, and whether some are always waiting."""

    prompt: int
    completion: int
    backlogged: bool
    adapters: list[str]


@dataclass
class Differences:
    """The largest difference of service, over all pairs and all times in which both tenants of a pair waited throughout."""

    largest: int = 0
    _ranges: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    def see(self, service: dict[str, int], waiting: set[str]) -> None:
        """Record the service so far and the tenants with waiting requests."""
        for pair in itertools.combinations(sorted(service), 2):
            if not waiting.issuperset(pair):
                self._ranges.pop(pair, None)
                continue
            difference = service[pair[0]] - service[pair[1]]
            low, high = self._ranges.get(pair, (difference, difference))
            self._ranges[pair] = low, high = min(low, difference), max(high, difference)
            self.largest = max(self.largest, high - low)


async def history(make: Callable[[str, int, int], Calls], seed: int, steps: int, *, scarce: bool = False) -> float:
    """Run a random history. Returns the largest difference of service ÷ the bound. With `scarce`, there are more adapters than adapter
    slots.

    `make` returns the calls of a new pool with these numbers of slots and adapter slots.
    """
    chance = random.Random(seed)  # noqa: S311 (a history, not a secret)
    slots, every = chance.choice(SLOT_CHOICES), chance.randint(5, 40)
    kinds = _tenants(chance, scarce=scarce)
    adapters = sorted({adapter for kind in kinds.values() for adapter in kind.adapters})
    calls = make(f"vtc-{seed}-{'scarce' if scarce else 'plain'}", slots, 2 if scarce else max(1, len(adapters)))
    await calls.beat(adapters)
    numbers = itertools.count()
    queued: dict[str, Request] = {}
    running: dict[str, Request] = {}
    service = dict.fromkeys(kinds, 0)
    differences, most_held, longest = Differences(), 0, 1

    async def submit(tenant: str) -> None:
        kind, completion = kinds[tenant], chance.randint(1, kinds[tenant].completion)
        allowed, guess = chance.randint(completion, kind.completion), chance.uniform(0.7, 1.5)
        request = Request(
            f"r{next(numbers)}", tenant, chance.choice(kind.adapters), chance.randint(1, kind.prompt), completion, allowed, guess
        )
        (running if await calls.submit(request) else queued)[request.id] = request

    for step in range(steps):
        for tenant, kind in kinds.items():
            waits = sum(request.tenant == tenant for request in queued.values())
            for _ in range(slots + 2 - waits if kind.backlogged else chance.choice((1, 1, 5)) * (chance.random() < 0.1)):
                await submit(tenant)
        for request in list(running.values()):
            longest = max(longest, request.prompt)
            service[request.tenant] += WQ + (0 if request.made else WP * request.prompt)
            request.made += 1
        most_held = max(most_held, sum(request.held for request in running.values()))
        ended = [request for request in running.values() if request.made == request.completion]
        # Checked during this step, and again below after ended requests have made room. A pair's range starts anew when one of its tenants
        # has nothing waiting.
        differences.see(service, {request.tenant for request in queued.values()})
        if step % every == 0:
            await calls.beat(adapters)
            await calls.renew(running.values(), progress=True)
        for request in ended:
            del running[request.id]
            await calls.release(request)
        if ended or step % every == 0:
            for name in await calls.renew(queued.values(), progress=False):
                running[name] = queued.pop(name)
            differences.see(service, {request.tenant for request in queued.values()})
    for request in [*running.values(), *queued.values()]:
        await calls.release(request)
    return differences.largest / (2 * max(WP * longest, WQ * most_held))


def _tenants(chance: random.Random, *, scarce: bool) -> dict[str, Kind]:
    """Create two to five tenants. The first two always have waiting requests, usually of very different lengths."""
    names = [f"t{number}" for number in range(chance.randint(2, 5))]
    return {
        name: Kind(
            prompt=chance.choice((8, 64, 256)),
            completion=chance.choice((4, 32, 128)),
            backlogged=number < 2,
            adapters=[f"{name}-{adapter}" for adapter in range(chance.randint(1, 4))] if scarce else [""],
        )
        for number, name in enumerate(names)
    }
