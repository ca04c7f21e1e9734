"""Measures how other tenants' load affects a tenant's requests, and how evenly waiting tenants are served."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench import vtc
from bench.client import Ask, Client, Place, client
from bench.frame import ROUNDS, Bar, Say, attempted, interleaved, ratios, summary
from bench.stack import stack
from lmaas.scheduling.client import Scheduler, connect
from lmaas.up import embedded

NAMES = ("fairness_ttft", "fairness_bound")

#: The crowd keeps the fake engine's slots full: TENANTS tenants, each with more open requests than its share of the slots.
SLOTS, TENANTS, OPEN = 16, 8, 3
FLOOD = 50
TOKEN_MS = 20
#: The number of the polite tenant's requests in a round. The first ones are sent while the load builds up, and do not count.
ASKED, UNCOUNTED = 30, 5

#: The number of histories in a round, and of the engine's steps in a history, which serve more than ten times the bound.
HISTORIES, STEPS = 8, 1500


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the requested bars of NAMES."""
    if "fairness_ttft" in wanted:
        yield await attempted("fairness_ttft", _ttft(model, folder / "home", say))
    if "fairness_bound" in wanted:
        yield await attempted("fairness_bound", _bound(folder / "valkey", say))


async def _ttft(model: Path, home: Path, say: Say) -> Bar:
    """Measure the polite tenant's time to first token on a full engine, with and without one of the others having 50 times its share of
    requests open. The polite tenant has one request open at a time."""
    say("starting lmaas with a fake engine")
    settings = {"engine_module": "lmaas.testing.fake_engine", "engine_args": f"--fake-token-ms {TOKEN_MS}", "engine_max_num_seqs": SLOTS}
    async with stack(model, home, **settings) as running, client() as asker:
        polite = running.base(await running.tenant("polite"))
        crowd = [running.base(await running.tenant(f"tenant-{number}")) for number in range(TENANTS)]
        await asker.ask(Ask(polite, [1], 1))
        fair = dict.fromkeys(crowd, OPEN)
        loads = {"fair": fair, "flood": fair | {crowd[0]: FLOOD * SLOTS // TENANTS}}
        figures = await interleaved(ROUNDS, {name: partial(_among, asker, polite, load) for name, load in loads.items()})
    medians = {name: [median(ttft for ttft, _ in each) for each in rounds] for name, rounds in figures.items()}
    detail: dict[str, Any] = summary(ratios(medians["flood"], medians["fair"]))
    detail |= {"ttft_s": {name: summary(each) for name, each in medians.items()}, "engine": f"fake, {SLOTS} slots, {TOKEN_MS} ms a token"}
    detail |= {"open requests": {"polite": 1, "crowd": f"{TENANTS} x {OPEN}", "flood": FLOOD * SLOTS // TENANTS}}
    detail |= {"worst_s": {name: max(ttft for each in rounds for ttft, _ in each) for name, rounds in figures.items()}}
    return Bar("fairness_ttft", detail["median"], "<=", 1.5, detail)


async def _among(asker: Client, polite: Place, crowd: dict[Place, int], number: int) -> list[tuple[float, float]]:
    """Return the (time to first token, total time) of the polite tenant's requests while each tenant of the crowd has its number of
    requests open."""
    chance = random.Random(number)  # noqa: S311 (lengths, not secrets)
    over = asyncio.Event()

    async def busy(place: Place) -> None:
        while not over.is_set():
            await asker.ask(Ask(place, [1], chance.randint(16, 48)))

    async with asyncio.TaskGroup() as group:
        for place, count in crowd.items():
            for _ in range(count):
                group.create_task(busy(place))
        try:
            answers = [await asker.ask(Ask(polite, [1], 8)) for _ in range(ASKED)]
        finally:
            over.set()  # open requests are completed, so that the next round starts with an idle engine
    return [(answer.ttft_s, answer.total_s) for answer in answers[UNCOUNTED:]]


async def _bound(folder: Path, say: Say) -> Bar:
    say("random histories on the scheduler's functions")
    with embedded.valkey(folder) as url:
        async with aclosing(connect(url)) as redis:
            calls = partial(vtc.Calls, Scheduler(redis))

            async def largest(number: int, *, scarce: bool) -> float:
                seeds = range(number * HISTORIES, (number + 1) * HISTORIES)
                return max([await vtc.history(calls, seed, STEPS, scarce=scarce) for seed in seeds])

            runs = {"plain": partial(largest, scarce=False), "scarce": partial(largest, scarce=True)}
            figures = await interleaved(ROUNDS, runs)
    detail: dict[str, Any] = summary(figures["plain"]) | {"histories": ROUNDS * HISTORIES, "steps": STEPS, "wp": vtc.WP, "wq": vtc.WQ}
    # VTC has no bound for this case, where a tenant is skipped if its adapter has no slot.
    detail |= {"more adapters than slots": summary(figures["scarce"])}
    return Bar("fairness_bound", max(figures["plain"]), "<=", 1, detail)
