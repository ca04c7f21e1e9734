"""Measures the cost of shared engines ÷ that of one engine per tenant, for a day simulated with the real policies, and for a short trace on
real engines and in the simulation."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from redis import Redis

from bench.bill.fit import fit
from bench.bill.real import TENANTS, compared, really, simulated, trace
from bench.bill.service import service
from bench.client import client
from bench.frame import ROUNDS, Bar, Say, summary
from lmaas.simulation.generate import Day, generate
from lmaas.simulation.profile import Profile
from lmaas.simulation.queue import server
from lmaas.simulation.replay import Arrangement, Options, replay

ALWAYS_ON, DEDICATED = "cogs_vs_always_on", "cogs_vs_dedicated_zero"
NAMES = (ALWAYS_ON, DEDICATED)
#: An invented day of 50 tenants, which docs/how-to/simulation.md describes.
DAY = Day()


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the requested bars of NAMES, with this machine's engines, over several days."""
    if not wanted:
        return
    profile = await measured(model, folder / "fit", say)
    with server() as redis:
        days = [_day(seed, profile, redis, say) for seed in range(ROUNDS)]
    checks = {}
    for arrangement in (Arrangement.SHARED, Arrangement.SCALE_TO_ZERO):
        checks[str(arrangement)] = await check(model, folder / arrangement.name.lower(), profile, arrangement, say)
    for name, bar in ((ALWAYS_ON, 0.02), (DEDICATED, 0.25)):
        if name in wanted:
            detail = summary([day[name] for day in days])
            on_engines = on_engines_of(name, checks)
            yield Bar(name, detail["median"], "<=", bar, {**detail, "days": days, "short trace on real engines": on_engines})


async def measured(model: Path, folder: Path, say: Say) -> Profile:
    """Measure the profile of an engine for the simulation."""
    say("starting lmaas to measure its engines")
    async with service(model, folder, TENANTS) as running, client() as asker:
        return await fit(asker, running, say)


async def check(model: Path, folder: Path, profile: Profile, arrangement: Arrangement, say: Say) -> dict[str, Any]:
    """Run the short trace on real engines, and in the simulation with this profile."""
    say(f"a short trace, {arrangement}")
    async with service(model, folder, TENANTS) as running, client() as asker:
        real = await really(asker, running, arrangement)
        sizes = running.sizes()
    profile = replace(profile, slots=sizes.slots, adapter_slots=sizes.adapter_slots, adapters_resident=sizes.adapters_resident)
    with server() as redis:
        found = compared(real, simulated(profile, arrangement, redis))
    say(f"{arrangement}: {found}")
    return found


def _day(seed: int, profile: Profile, redis: Redis, say: Say) -> dict[str, Any]:
    """Simulate the day of one seed. Returns the ratios and the figures of the day."""
    requests = generate(replace(DAY, seed=seed))
    shared = replay(requests, Arrangement.SHARED, Options(profile=profile), redis)
    own = replay(requests, Arrangement.SCALE_TO_ZERO, Options(profile=profile), redis)
    # One engine for each tenant, including those without requests, for the length of the day.
    always_on_s = DAY.tenants * DAY.length_s
    day = {
        "seed": seed,
        ALWAYS_ON: shared.tally.engine_s / always_on_s,
        DEDICATED: shared.tally.engine_s / own.tally.engine_s,
        "requests": len(requests),
        "completion_tokens": requests.tokens[1],
        "engine_s": {"always on": always_on_s, "scale-to-zero": own.tally.engine_s, "shared": shared.tally.engine_s},
        "ttft_p50_p99_s": {str(each.arrangement): [each.ttft_percentile_s(50), each.ttft_percentile_s(99)] for each in (own, shared)},
        "starts": {str(each.arrangement): each.tally.starts for each in (own, shared)},
    }
    say(f"day {seed}: {day[ALWAYS_ON]:.4f} of always on, {day[DEDICATED]:.3f} of scale-to-zero")
    return day


def on_engines_of(name: str, checks: dict[str, Any]) -> dict[str, Any]:
    """Return the same ratio for the short trace, as measured and as simulated."""
    shared, own = checks[Arrangement.SHARED], checks[Arrangement.SCALE_TO_ZERO]
    requests = trace()
    below = {way: len(TENANTS) * requests.span_s if name == ALWAYS_ON else own[way]["engine_s"] for way in ("real", "simulated")}
    found = {way: round(shared[way]["engine_s"] / below[way], 3) for way in below}
    return {"tenants": len(TENANTS), "requests": len(requests), **found, **checks}
