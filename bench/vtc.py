"""The service that tenants get of a simulated engine whose slots the real scheduler gives out, against the bound that VTC proves.

"Fairness in Serving Large Language Models" (Sheng et al., OSDI'24): service is the weighted number of tokens, and two tenants that have
requests waiting all the time differ by no more than 2·max(wp·Linput, wq·M), M being the most tokens that the running batch holds.
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

#: What a prompt token and a completion token count.
WP, WQ = 1, 2
SLOT_CHOICES = (2, 4, 8)
REPLICA = "engine"
_GATEWAY = "bench"


@dataclass(eq=False)
class Job:
    """A request: it stops after `completion` tokens, though it may have allowed more. `made` of them are made.

    Before it has run, its prompt is taken to have `guess` times as many tokens as it has.
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
        """Its tokens in the running batch."""
        return self.prompt + self.made if self.made else 0


class Calls:
    """The calls of a gateway and a supervisor to the scheduler, for one pool. Only this class knows the arguments of its functions."""

    def __init__(self, scheduler: Scheduler, pool: str, slots: int, adapter_slots: int) -> None:
        self._scheduler, self._pool = scheduler, pool
        self._slots, self._adapter_slots = slots, adapter_slots
        self._tickets: dict[str, Ticket] = {}

    async def submit(self, job: Job) -> bool:
        """Queue a job; whether it runs at once."""
        # The scheduler gets estimates: the likely prompt length and the allowed completion. It cannot know the real ones.
        ticket = Ticket(
            id=job.id,
            pool=self._pool,
            tenant=job.tenant,
            gateway=_GATEWAY,
            adapter=job.adapter,
            source="s",
            weight=1,
            event="{}",
            prompt_tokens=max(1, round(job.prompt * job.guess)),
            completion_tokens=job.allowed,
        )
        self._tickets[job.id] = ticket
        return bool((await self._scheduler.submit(ticket, Bounds(10_000, 10_000)))["state"] == TicketState.GRANTED)

    async def renew(self, jobs: Iterable[Job], *, progress: bool) -> set[str]:
        """Keep jobs alive and report their progress. Returns the ids of those that run."""
        told = [(job.id, TokenCounts(job.prompt, 0, job.made) if progress and job.made else None) for job in jobs]
        reply = await self._scheduler.renew(self._pool, told)
        return {name for (name, _), report in zip(told, reply["tickets"], strict=True) if report["state"] == TicketState.GRANTED}

    async def release(self, job: Job) -> None:
        """A job has ended."""
        event = {"request_id": job.id, "prompt_tokens": job.prompt, "cached_tokens": 0, "completion_tokens": job.completion}
        await self._scheduler.release(self._tickets.pop(job.id), json.dumps(event), 100, TokenCounts(job.prompt, 0, job.completion))

    async def beat(self, resident: list[str]) -> None:
        """The engine lives."""
        await self._scheduler.heartbeat(
            self._pool, REPLICA, Beat("http://engine", self._slots, self._adapter_slots, Observed.READY, resident)
        )


@dataclass
class Kind:
    """The requests of a tenant: lengths up to these bounds, and whether it always has more waiting."""

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
        """Take the service so far, and who has something waiting."""
        for pair in itertools.combinations(sorted(service), 2):
            if not waiting.issuperset(pair):
                self._ranges.pop(pair, None)
                continue
            difference = service[pair[0]] - service[pair[1]]
            low, high = self._ranges.get(pair, (difference, difference))
            self._ranges[pair] = low, high = min(low, difference), max(high, difference)
            self.largest = max(self.largest, high - low)


async def history(make: Callable[[str, int, int], Calls], seed: int, steps: int, *, scarce: bool = False) -> float:
    """Run a random history. Returns the largest difference of service ÷ the bound. `scarce`: more adapters than adapter slots.

    `make` gives the calls of a new pool with so many slots and adapter slots.
    """
    chance = random.Random(seed)  # noqa: S311 (a history, not a secret)
    slots, every = chance.choice(SLOT_CHOICES), chance.randint(5, 40)
    kinds = _tenants(chance, scarce=scarce)
    adapters = sorted({adapter for kind in kinds.values() for adapter in kind.adapters})
    calls = make(f"vtc-{seed}-{'scarce' if scarce else 'plain'}", slots, 2 if scarce else max(1, len(adapters)))
    await calls.beat(adapters)
    numbers = itertools.count()
    queued: dict[str, Job] = {}
    running: dict[str, Job] = {}
    service = dict.fromkeys(kinds, 0)
    differences, batch, longest = Differences(), 0, 1

    async def submit(tenant: str) -> None:
        kind, completion = kinds[tenant], chance.randint(1, kinds[tenant].completion)
        allowed, guess = chance.randint(completion, kind.completion), chance.uniform(0.7, 1.5)
        job = Job(f"r{next(numbers)}", tenant, chance.choice(kind.adapters), chance.randint(1, kind.prompt), completion, allowed, guess)
        (running if await calls.submit(job) else queued)[job.id] = job

    for step in range(steps):
        for tenant, kind in kinds.items():
            waits = sum(job.tenant == tenant for job in queued.values())
            for _ in range(slots + 2 - waits if kind.backlogged else chance.choice((1, 1, 5)) * (chance.random() < 0.1)):
                await submit(tenant)
        for job in list(running.values()):
            longest = max(longest, job.prompt)
            service[job.tenant] += WQ + (0 if job.made else WP * job.prompt)
            job.made += 1
        batch = max(batch, sum(job.held for job in running.values()))
        ended = [job for job in running.values() if job.made == job.completion]
        # During this step, and below after its end has made room: a tenant that has nothing waiting in between starts anew.
        differences.see(service, {job.tenant for job in queued.values()})
        if step % every == 0:
            await calls.beat(adapters)
            await calls.renew(running.values(), progress=True)
        for job in ended:
            del running[job.id]
            await calls.release(job)
        if ended or step % every == 0:
            for name in await calls.renew(queued.values(), progress=False):
                running[name] = queued.pop(name)
            differences.see(service, {job.tenant for job in queued.values()})
    for job in [*running.values(), *queued.values()]:
        await calls.release(job)
    return differences.largest / (2 * max(WP * longest, WQ * batch))


def _tenants(chance: random.Random, *, scarce: bool) -> dict[str, Kind]:
    """Two to five tenants; the first two always wait, and ask for very different things more often than not."""
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
