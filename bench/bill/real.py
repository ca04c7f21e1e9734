"""Runs a short trace on real engines and in the simulation."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from redis import Redis

from bench.bill.fit import prompt
from bench.bill.service import IDLE_TIMEOUT_S, Service
from bench.client import Ask, Client, Place, percentile
from lmaas.simulation.generate import Day, generate
from lmaas.simulation.profile import Profile
from lmaas.simulation.replay import Arrangement, Options, replay
from lmaas.simulation.trace import Request, Trace
from lmaas.store.models import BaseModel

TENANTS = ("tenant-01", "tenant-02", "tenant-03")
#: A hundred seconds of three tenants, each in bursts. All sizes are those of a day, but shorter.
SHORT_DAY = Day(
    seed=8,
    tenants=len(TENANTS),
    bursts=10,
    zipf=0.7,
    night=1.0,
    burst_s=6.0,
    between_s=0.8,
    prompt_tokens=60,
    completion_tokens=24,
    max_tokens=200,
    length_s=100.0,
)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a trace, in seconds: the engines' time (by phase where it is known), and the median time to first token."""

    engine_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    starts: int
    phases_s: Mapping[str, float]

    def shown(self) -> dict[str, Any]:
        """Return the outcome in the form of the results file."""
        figures = {"engine_s": self.engine_s, "ttft_p50_s": self.ttft_p50_s, "ttft_p95_s": self.ttft_p95_s}
        shown: dict[str, Any] = {name: round(value, 3) for name, value in figures.items()} | {"starts": self.starts}
        return shown | ({"phases_s": {name: round(value, 1) for name, value in self.phases_s.items()}} if self.phases_s else {})


def trace() -> Trace:
    """Return the trace of the short day."""
    made = generate(SHORT_DAY)
    if set(made.tenants) != set(TENANTS):
        raise RuntimeError(f"the short day has only {made.tenants}")
    return made


async def really(asker: Client, service: Service, arrangement: Arrangement) -> Outcome:
    """Replay the short day on real engines, from no engine to no engine."""
    shared = arrangement is Arrangement.SHARED
    places = {tenant: each.shared if shared else each.own for tenant, each in service.places.items()}
    models: Sequence[BaseModel] = [service.shared] if shared else list(service.own.values())
    before_ms, before = sum((await service.engine_ms(models)).values()), len(await service.replicas(models))
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def one(number: int, request: Request, place: Place) -> float:
        await asyncio.sleep(began + request.at_s - loop.time())
        ask = Ask(place, prompt(number, request.prompt_tokens), request.completion_tokens)
        return (await asker.ask(ask)).ttft_s

    waits = await asyncio.gather(*(one(number, request, places[request.tenant]) for number, request in enumerate(trace())))
    await service.gone()
    phases_ms = await service.engine_ms(models)
    return Outcome(
        (sum(phases_ms.values()) - before_ms) / 1000,
        median(waits),
        percentile(waits, 95),
        len(await service.replicas(models)) - before,
        {str(phase): ms / 1000 for phase, ms in phases_ms.items()} if before_ms == 0 else {},
    )


def simulated(profile: Profile, arrangement: Arrangement, redis: Redis) -> Outcome:
    """Replay the short day in the simulation."""
    options = Options(profile=profile, idle_timeout_s=IDLE_TIMEOUT_S, max_replicas=1)
    result = replay(trace(), arrangement, options, redis)
    tally = result.tally
    return Outcome(tally.engine_s, median(result.ttft_s), percentile(result.ttft_s, 95), tally.starts, {})


def compared(real: Outcome, model: Outcome) -> dict[str, Any]:
    """Return both outcomes and the relative error of the simulation (0.1 means a tenth too much)."""
    error = {
        "engine_s": round(model.engine_s / real.engine_s - 1, 3),
        "ttft_p50_s": round(model.ttft_p50_s / real.ttft_p50_s - 1, 3),
    }
    return {"real": real.shown(), "simulated": model.shown(), "error": error}
