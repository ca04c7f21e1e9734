"""Measures the cost of the scheduler's function library for a Valkey server, under thousands of replicas without engines."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from bench.fleet.names import Fleet, Sizes
from bench.frame import ROUNDS, Bar, Run, Say, attempted, interleaved, ratios, summary
from lmaas.scheduling.client import Scheduler, connect
from lmaas.up import embedded

NAMES = ("fleet_cost", "fleet_cost_heartbeat", "fleet_replica_lost", "fleet_rate")
#: A fleet whose slots are half taken, and one replica of it.
MANY, ONE = Sizes(1000, 64, running=8000), Sizes(1, 64, running=8)
#: A fleet that runs many tickets and has free slots.
RUNNING = Sizes(1000, 64, running=16_000, slots=32)
#: Many pools.
POOLS = Sizes(10_000, 8, pools=1000, at_once=32)


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the requested bars of NAMES."""
    measuring = {"fleet_replica_lost": _replica_lost, "fleet_rate": _rate}
    costs = [name for name in NAMES[:2] if name in wanted]
    if costs:
        say(f"a fleet of {MANY.replicas:,} replicas beside one")
        for bar in await _costs(folder / "costs", costs):
            yield bar
    for name, measured in measuring.items():
        if name in wanted:
            say(f"the fleet of {name}")
            yield await attempted(name, measured(folder / name))


@asynccontextmanager
async def fleets(folder: Path, **sizes: Sizes) -> AsyncIterator[dict[str, Fleet]]:
    """Start a server with these fleets, by name."""
    with embedded.valkey(folder) as url:
        redis = connect(url)
        try:
            information: Any = await redis.info("server")
            server = psutil.Process(int(information["process_id"]))
            await Scheduler(redis).load()  # otherwise many first calls would load the library at once
            made = {name: Fleet(name, each, redis, server) for name, each in sizes.items()}
            for fleet in made.values():
                await fleet.load()
            yield made
        finally:
            await redis.aclose()


def windows(made: dict[str, Fleet], figure: Callable[[str], Callable[[], Awaitable[float]]]) -> dict[str, Run[float]]:
    """Return the measurement of each fleet as a run for `interleaved`. All fleets are kept alive before each window."""

    async def run(name: str) -> float:
        for fleet in made.values():
            await fleet.live()
        return await figure(name)()

    def of(name: str) -> Run[float]:
        return lambda _: run(name)

    return {name: of(name) for name in made}


async def _costs(folder: Path, wanted: Sequence[str]) -> list[Bar]:
    async with fleets(folder, many=MANY, one=ONE) as made:
        beats = await interleaved(ROUNDS, windows(made, lambda name: made[name].heartbeats)) if NAMES[1] in wanted else None
        if NAMES[0] in wanted:
            room = await interleaved(ROUNDS, windows(made, lambda name: made[name].with_room))
            async with made["many"].full() as many, made["one"].full() as one:
                full = await interleaved(ROUNDS, windows(made, {"many": many, "one": one}.__getitem__))
    bars = []
    if NAMES[0] in wanted:
        ways: dict[str, dict[str, Any]] = {"with room": _ratio(room), "with a full queue": _ratio(full)}
        worse = max(ways, key=lambda way: float(ways[way]["median"]))
        bars.append(Bar(NAMES[0], ways[worse]["median"], "<=", 1.5, {"worse": worse, **ways[worse], **ways}))
    if beats is not None:
        detail = _ratio(beats)
        bars.append(Bar(NAMES[1], detail["median"], "<=", 1.5, detail))
    return bars


def _ratio(figures: dict[str, list[float]]) -> dict[str, Any]:
    us = {name: summary(each) for name, each in figures.items()}
    return {**summary(ratios(figures["many"], figures["one"])), "cpu_us": us}


async def _replica_lost(folder: Path) -> Bar:
    """Measure the longest call when a replica ends, and when one is silent until it counts as dead. The worse one counts."""
    async with fleets(folder, many=RUNNING) as made:
        fleet = made["many"]

        async def lose(_: int) -> float:
            await fleet.live()
            return await fleet.lose_replica()

        ended = (await interleaved(ROUNDS, {"ended": lose}))["ended"]
        silent = await fleet.silence_replica()
    detail: dict[str, Any] = summary(ended) | {"silent_ms": silent, "replicas": RUNNING.replicas, "running": RUNNING.running}
    return Bar("fleet_replica_lost", detail["median"], "<=", 5, detail)


async def _rate(folder: Path) -> Bar:
    """Measure how many requests a second one core serves, after the heartbeats of all replicas have taken their share of it."""
    async with fleets(folder, pools=POOLS) as made:
        beats = windows(made, lambda name: made[name].heartbeats)["pools"]
        turns = windows(made, lambda name: made[name].with_room)["pools"]
        figures = await interleaved(ROUNDS, {"heartbeat": beats, "submit + release": turns})
    rates = [
        (1 - POOLS.replicas * beat / 1e6) / turn * 1e6 for beat, turn in zip(figures["heartbeat"], figures["submit + release"], strict=True)
    ]
    cpu_us = {name: summary(each) for name, each in figures.items()}
    detail: dict[str, Any] = {
        **summary(rates),
        "cpu_us": cpu_us,
        "replicas": POOLS.replicas,
        "pools": POOLS.pools,
        "resident": POOLS.resident,
    }
    return Bar("fleet_rate", detail["median"], ">=", 5000, detail)
