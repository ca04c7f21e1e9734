"""Our LoRA kernels for vLLM's CPU backend against stock vLLM's: the same server, with lmaas's plugin and without."""

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench import adapters
from bench.engines import BASE, Engine, Load, server
from bench.frame import ROUNDS, Bar, interleaved, ratios, summary

NAMES = ("lora_isolation", "lora_decode", "lora_prefill", "lora_rank_padding", "lora_never_slower", "adapters_vs_base")
RANKS = (8, 16, 64)
#: A mix this close to the bar gets more rounds: its median would be noise.
CLOSE, CLOSE_ROUNDS = 1.15, 25

DECODE = Load((), 32, 32, 64)
PREFILL = Load((), 8, 512, 1)


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Callable[[str], None]) -> AsyncIterator[Bar]:
    """The bars of NAMES that are wanted. Servers run two or three at a time; all but the one that is asked sleep."""
    slowest: dict[str, dict[str, Any]] = {}
    for rank in RANKS:
        grid = "lora_never_slower" in wanted
        first, padding = rank == RANKS[0], rank == RANKS[-1] and "lora_rank_padding" in wanted
        if not grid and not padding and not (first and set(wanted) & {"lora_isolation", "lora_decode", "lora_prefill", "adapters_vs_base"}):
            continue
        async with AsyncExitStack() as stack:
            engines = {}
            options = ("--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "8", "--max-cpu-loras", "16")
            for kind in ("ours", "stock"):
                say(f"starting vLLM for rank {rank}: {kind}")
                engines[kind] = await stack.enter_async_context(
                    server(model, folder / f"{kind}-{rank}.log", *options, plugins=kind == "ours")
                )
            mine = adapters.make(model, folder, rank, 8)
            if padding:
                padded = adapters.make(model, folder, 8, 8)
                yield await _against_stock("lora_rank_padding", 4, engines, Load(list(padded), 32, 8, 16), padded)
            for engine in engines.values():
                await engine.load(mine)
            if first:
                if "lora_isolation" in wanted:
                    yield await _isolation(engines, list(mine))
                for name, bar, load in (("lora_decode", 1.8, DECODE), ("lora_prefill", 3, PREFILL)):
                    if name in wanted:
                        yield await _against_stock(name, bar, engines, _with(load, list(mine)))
                if "adapters_vs_base" in wanted:
                    say("starting vLLM without LoRA")
                    engines["without LoRA"] = await stack.enter_async_context(server(model, folder / "base.log"))
                    yield await _against_base(engines, list(mine))
                    del engines["without LoRA"]
            if grid:
                slowest |= await _grid(rank, engines, list(mine), say)
    if slowest:
        worst = min(slowest, key=lambda mix: slowest[mix]["median"])
        detail = {"worst": worst, **slowest[worst], "mixes": slowest}
        yield Bar("lora_never_slower", slowest[worst]["median"], ">=", 1, detail)


def _with(load: Load, models: Sequence[str]) -> Load:
    return Load(models, load.requests, load.prompt_tokens, load.completion_tokens)


async def _figures(engines: dict[str, Engine], load: Load, rounds: int = ROUNDS, first: int = 0) -> dict[str, list[float]]:
    return await interleaved(rounds, {kind: partial(engine.tokens_per_s, load) for kind, engine in engines.items()}, first)


def _detail(figures: dict[str, list[float]], above: str, below: str) -> dict[str, Any]:
    return summary(ratios(figures[above], figures[below])) | {"tokens_per_s": {kind: summary(f, 1) for kind, f in figures.items()}}


async def _against_stock(name: str, bar: float, engines: dict[str, Engine], load: Load, new: "dict[str, Path] | None" = None) -> Bar:
    for engine in engines.values():
        await (engine.load(new) if new else engine.warm(load.models))
    detail = _detail(await _figures(engines, load), "ours", "stock")
    return Bar(name, detail["median"], ">=", bar, detail)


async def _against_base(engines: dict[str, Engine], models: Sequence[str]) -> Bar:
    async def without(seed: int) -> float:
        return await engines["without LoRA"].tokens_per_s(_with(DECODE, [BASE]), seed)

    async def ours(models: Sequence[str], seed: int) -> float:
        return await engines["ours"].tokens_per_s(_with(DECODE, models), seed)

    runs = {"eight adapters": partial(ours, models), "one adapter": partial(ours, models[:1]), "base requests": partial(ours, [BASE])}
    figures = await interleaved(ROUNDS, runs | {"without LoRA": without})
    detail = _detail(figures, "eight adapters", "without LoRA")
    for name in ("one adapter", "base requests"):
        detail[f"{name} ÷ without LoRA"] = summary(ratios(figures[name], figures["without LoRA"]))
    return Bar("adapters_vs_base", detail["median"], ">=", 0.7, detail)


async def _grid(rank: int, engines: dict[str, Engine], models: Sequence[str], say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Ratios of every mix of these adapters, and of base requests beside none of them, by the mix's description."""
    decode = {1: Load((), 1, 8, 24), 8: Load((), 8, 8, 16), 32: Load((), 32, 8, 12)}
    prefill = {1: Load((), 1, 512, 1), 8: Load((), 8, 64, 1), 32: Load((), 32, 16, 1)}
    result = {}
    for count, (kind, loads), at_once in itertools.product((0, 1, 2, 8), (("decode", decode), ("prefill", prefill)), (1, 8, 32)):
        load = _with(loads[at_once], models[:count] or [BASE])
        figures = await _figures(engines, load)
        if median(ratios(figures["ours"], figures["stock"])) < CLOSE:
            more = await _figures(engines, load, CLOSE_ROUNDS - ROUNDS, ROUNDS)
            figures = {name: figures[name] + more[name] for name in figures}
        what = f"{count} adapters of rank {rank}" if count else f"base requests, max_lora_rank {rank}"
        mix = f"{what}, {kind}, {at_once} at a time"
        result[mix] = _detail(figures, "ours", "stock")
        say(f"{mix}: {result[mix]['median']:.3g}")
    return result


async def _isolation(engines: dict[str, Engine], models: Sequence[str]) -> Bar:
    """The share of greedy answers that are the same alone and among others, half of them the base model's, the rest of all adapters."""
    places = (
        "Paris",
        "Rome",
        "the Nile",
        "Japan",
        "the Moon",
        "Peru",
        "Oslo",
        "the Alps",
        "Mars",
        "Cairo",
        "Lima",
        "Texas",
        "Kyoto",
        "Wales",
    )
    prompts = [f"The history of {place} begins with" for place in places] + ["Once upon a time", "A recipe for bread:"]
    asks = [(model, prompt) for i, prompt in enumerate(prompts) for model in (BASE, models[i % len(models)])]
    alone = {kind: {ask: await _answer(engine, ask) for ask in asks} for kind, engine in engines.items()}

    async def share(kind: str, number: int) -> float:
        order = random.Random(number).sample(asks, len(asks))  # noqa: S311 (an order, not a secret)
        answers = await asyncio.gather(*(_answer(engines[kind], ask) for ask in order))
        return sum(alone[kind][ask] == answer for ask, answer in zip(order, answers, strict=True)) / len(asks)

    shares = await interleaved(ROUNDS, {kind: partial(share, kind) for kind in engines})
    detail = {**summary(shares["ours"]), "answers": ROUNDS * len(asks), "stock": summary(shares["stock"])}
    # Of all rounds together: one answer that differs in any of them is a defect.
    return Bar("lora_isolation", sum(shares["ours"]) / ROUNDS, "=", 1, detail)


async def _answer(engine: Engine, ask: tuple[str, str]) -> str:
    return str(json.loads(await engine.complete(*ask, 48))["choices"][0]["text"])
