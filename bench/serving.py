"""Compares requests through a whole service with the same requests sent directly to its vLLM."""

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench import adapters, engines
from bench.client import Ask, Client, Place, Run, client
from bench.frame import ROUNDS, Bar, Op, Say, attempted, interleaved, ratios, summary
from bench.stack import Adapter, Stack, stack

NAMES = ("added_ttft_ms", "engine_kept_busy", "slot_aware_ttft_p50", "slot_aware_throughput", "slot_aware_ttft_p99")
#: The most common rank.
RANK = 8
#: A prompt that is measured twice, once on each way, must not be cached the second time.
ENGINE_ARGS = "--no-enable-prefix-caching"

#: The bar is too close to 1 for one round on a machine with other work.
BUSY_ROUNDS = 11

#: The number of pairs of requests, one on each way, in a round of `added_ttft_ms`.
PAIRS = 24

ADAPTERS, SLOTS = 8, 2
#: The ways to compare with: directly to the engine that lmaas uses, and to stock vLLM, which users have without lmaas.
STRAIGHT, STOCK = "the same engine", "stock vLLM"


@dataclass(frozen=True)
class Load:
    """A load of requests, `at_once` of them at any time. Prompts are random tokens. Lengths are uniform between the bounds."""

    requests: int
    at_once: int
    prompt_tokens: tuple[int, int]
    completion_tokens: tuple[int, int]

    def asks(self, places: Sequence[Place], seed: int) -> list[Ask]:
        """Return the requests, for these places in turn. The same seed gives the same prompts and lengths."""
        chance = random.Random(seed)  # noqa: S311 (prompts, not secrets)
        asks = []
        for number in range(self.requests):
            prompt = [chance.randrange(1000, 40000) for _ in range(chance.randint(*self.prompt_tokens))]
            asks.append(Ask(places[number % len(places)], prompt, chance.randint(*self.completion_tokens)))
        return asks

    async def run(self, asker: Client, places: Sequence[Place], seed: int) -> Run:
        """Send the requests, and wait for all answers."""
        return await asker.run(self.asks(places, seed), self.at_once)


#: Twice as many clients as the engine runs at once, so that a finished request is replaced immediately.
BUSY = Load(96, at_once=32, prompt_tokens=(16, 48), completion_tokens=(16, 48))
SCARCE = Load(112, at_once=32, prompt_tokens=(16, 48), completion_tokens=(16, 48))


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the requested bars of NAMES, each on one engine, through lmaas and directly."""
    if not wanted:
        return
    made = adapters.make(model, folder, RANK, ADAPTERS)
    if set(wanted) & set(NAMES[:2]):
        async with _serving(model, folder / "usual", say) as (asker, running):
            tenant = await running.tenant("bench")
            adapter = await running.adapter(tenant, "adapter", next(iter(made.values())))
            [straight] = await _straight(asker, running, [adapter])
            if "added_ttft_ms" in wanted:
                yield await attempted("added_ttft_ms", _added_ttft(asker, adapter.through, straight))
            if "engine_kept_busy" in wanted:
                yield await attempted("engine_kept_busy", _kept_busy(asker, adapter.through, straight))
    if slot_aware := set(wanted) & set(NAMES[2:]):
        for bar in await _slot_aware(model, folder, made, say):
            if bar.name in slot_aware:
                yield bar


@asynccontextmanager
async def _serving(model: Path, home: Path, say: Say, **settings: object) -> AsyncIterator[tuple[Client, Stack]]:
    say(f"starting lmaas {settings or ''}")
    async with stack(model, home, engine_args=ENGINE_ARGS, **settings) as running, client() as asker:
        await running.keep_one_engine()
        yield asker, running


async def _straight(asker: Client, running: Stack, used: Sequence[Adapter]) -> list[Place]:
    """Return the same adapters for direct requests. A request to each through lmaas has started the engine and loaded them."""
    for adapter in used:
        await asker.ask(Ask(adapter.through, "Hello", 2))
    url = await running.engine_url()
    places = [adapter.straight(url) for adapter in used]
    for place in places:
        await asker.ask(Ask(place, "Hello", 2))
    return places


async def _added_ttft(asker: Client, through: Place, straight: Place) -> Bar:
    """Measure the median difference between two consecutive requests, one on each way. The order alternates."""

    async def pairs(number: int) -> list[tuple[float, float]]:
        figures = []
        for pair in range(number * PAIRS, (number + 1) * PAIRS):
            prompt = f"Tell me in a few words what the number {pair} stands for, and in which city of Europe it would feel at home."
            order = (through, straight) if pair % 2 else (straight, through)
            first, second = [await asker.ask(Ask(place, prompt, 4)) for place in order]
            ours, bare = (first, second) if pair % 2 else (second, first)
            figures.append((ours.ttft_s * 1000, bare.ttft_s * 1000))
        return figures

    await pairs(ROUNDS)  # opens connections
    rounds = (await interleaved(ROUNDS, {"pairs": pairs}))["pairs"]
    detail: dict[str, Any] = summary([median(ours - bare for ours, bare in each) for each in rounds])
    detail |= {"pairs": ROUNDS * PAIRS, "through_ms": summary([median(ours for ours, _ in each) for each in rounds])}
    detail |= {"straight_ms": summary([median(bare for _, bare in each) for each in rounds])}
    return Bar("added_ttft_ms", detail["median"], "<=", 2, detail)


async def _kept_busy(asker: Client, through: Place, straight: Place) -> Bar:
    runs = {way: partial(BUSY.run, asker, [place]) for way, place in (("lmaas", through), ("straight", straight))}
    await BUSY.run(asker, [straight], seed=-1)
    figures = await interleaved(BUSY_ROUNDS, runs)
    tokens_per_s = {way: [run.tokens_per_s for run in each] for way, each in figures.items()}
    detail = summary(ratios(tokens_per_s["lmaas"], tokens_per_s["straight"]))
    tokens = {way: summary(each) for way, each in tokens_per_s.items()}
    ttft = {way: summary([run.ttft_s(50) for run in each]) for way, each in figures.items()}
    shown = {**detail, "tokens_per_s": tokens, "ttft_p50_s": ttft, "clients": BUSY.at_once, "requests": BUSY.requests}
    return Bar("engine_kept_busy", detail["median"], ">=", 0.97, shown)


async def _slot_aware(model: Path, folder: Path, made: dict[str, Path], say: Say) -> list[Bar]:
    """Measure eight adapters in turn on two slots, for one tenant and for eight tenants. The worse ratio counts.

    The comparison is with stock vLLM, so it includes lmaas's LoRA kernels and the order of requests. The ratio to direct requests on the
    same engine, which shows the effect of the order alone, is in the detail.
    """
    async with _serving(model, folder / "scarce", say, engine_max_loras=SLOTS) as (asker, running), _stock(model, folder, say) as stock:
        one = await running.tenant("one")
        ours = {
            "one tenant": [await running.adapter(one, name, path) for name, path in made.items()],
            "eight tenants": [await running.adapter(await running.tenant(f"has-{name}"), name, path) for name, path in made.items()],
        }
        straight = {way: await _straight(asker, running, used) for way, used in ours.items()}["eight tenants"]
        ways = {way: [adapter.through for adapter in used] for way, used in ours.items()} | {STRAIGHT: straight}
        await stock.load(made)
        ways[STOCK] = [Place(f"{stock.url}/v1", name) for name in made]
        for place in ways[STOCK]:
            await asker.ask(Ask(place, "Hello", 2))
        await SCARCE.run(asker, straight, seed=-1)
        figures = await interleaved(ROUNDS, {way: partial(SCARCE.run, asker, places) for way, places in ways.items()})
    return [
        worse("slot_aware_ttft_p50", "<=", 0.55, figures, lambda run: run.ttft_s(50)),
        worse("slot_aware_throughput", ">=", 1.8, figures, lambda run: run.tokens_per_s),
        worse("slot_aware_ttft_p99", "<=", 0.6, figures, lambda run: run.ttft_s(99)),
    ]


def _stock(model: Path, folder: Path, say: Say) -> AbstractAsyncContextManager[engines.Engine]:
    """Start a vLLM server of the same sizes as pip installs it, without lmaas's kernels."""
    say("starting stock vLLM")
    sizes = ("--enable-lora", "--max-lora-rank", "16", "--max-loras", str(SLOTS), "--max-cpu-loras", "64", "--max-num-seqs", "16")
    return engines.server(model, folder / "stock.log", *sizes, plugins=False)


def worse(name: str, op: Op, bar: float, figures: dict[str, list[Run]], figure: Callable[[Run], float]) -> Bar:
    """Return the bar of the worse way through lmaas ÷ stock vLLM, with all ratios and figures in the detail."""
    seen = {way: [figure(run) for run in runs] for way, runs in figures.items()}
    ours = [way for way in seen if way not in (STRAIGHT, STOCK)]
    by_way = {other: {way: summary(ratios(seen[way], seen[other])) for way in ours} for other in (STOCK, STRAIGHT)}
    picked = (max if op == "<=" else min)(ours, key=lambda way: by_way[STOCK][way]["median"])
    detail: dict[str, Any] = {"worse": picked, **by_way[STOCK][picked], **{f"÷ {other}": each for other, each in by_way.items()}}
    detail |= {"figures": {way: summary(each) for way, each in seen.items()}, "clients": SCARCE.at_once, "requests": SCARCE.requests}
    return Bar(name, detail["median"], op, bar, detail)
