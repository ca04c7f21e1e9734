"""Compares the LoRA kernels of lmaas on CPUs with stock vLLM: the same server, with the plugin and without."""

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench import adapters
from bench.engines import BASE, Engine, Load, server
from bench.frame import ROUNDS, Bar, Say, attempted, interleaved, ratios, summary
from lmaas.engine.cpu_lora.plugin import ACTIVE_MARK

NAMES = ("lora_isolation", "lora_decode", "lora_prefill", "adapters_vs_base", "lora_rank_padding", "lora_never_slower")
#: The maximum ranks of the servers. The first is the default of vLLM and lmaas.
MAX_RANKS = (16, 8, 64)
#: The rank of the adapters where a bar does not name another one. It is the most common rank.
RANK = 8

DECODE = Load(32, at_once=32, prompt_tokens=32, completion_tokens=48)
PREFILL = Load(8, at_once=8, prompt_tokens=512, completion_tokens=1)
#: The mixes of `lora_never_slower`: (decode, prefill) for each number of concurrent requests.
GRID = {
    1: (Load(8, at_once=1, prompt_tokens=8, completion_tokens=6), Load(8, at_once=1, prompt_tokens=64, completion_tokens=1)),
    8: (Load(8, at_once=8, prompt_tokens=8, completion_tokens=16), Load(8, at_once=8, prompt_tokens=64, completion_tokens=1)),
    32: (Load(32, at_once=32, prompt_tokens=8, completion_tokens=12), Load(32, at_once=32, prompt_tokens=16, completion_tokens=1)),
}
#: A mix this close to the bar gets more rounds, because noise would decide its median.
CLOSE, CLOSE_ROUNDS = 1.1, 25
KINDS = ("ours", "stock")


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the requested bars of NAMES. Two or three servers run at a time; all are idle except the one that is measured."""
    mixes: dict[str, dict[str, Any]] = {}
    for max_rank in MAX_RANKS:
        here = set(wanted) & ({"lora_never_slower"} | set(NAMES[:4] if max_rank == MAX_RANKS[0] else NAMES[4:5] if max_rank == 64 else ()))
        if not here:
            continue
        async with AsyncExitStack() as stack:
            engines = {kind: await stack.enter_async_context(_server(model, folder, kind, max_rank, say)) for kind in KINDS}
            names = list(await _loaded(engines, adapters.make(model, folder, RANK, 8)))
            if "lora_isolation" in here:
                yield await attempted("lora_isolation", _isolation(engines, names))
            for name, bar, load in (
                ("lora_decode", 1.8, replace(DECODE, models=names)),
                ("lora_prefill", 3, replace(PREFILL, models=names)),
                ("lora_rank_padding", 4, replace(GRID[32][0], models=names)),
            ):
                if name in here:
                    yield await attempted(name, _against_stock(name, bar, engines, load))
            if "adapters_vs_base" in here:
                yield await attempted("adapters_vs_base", _against_base(model, folder, engines["ours"], names, say))
            if "lora_never_slower" in here:
                if max_rank != RANK:
                    names = list(await _loaded(engines, adapters.make(model, folder, max_rank, 8)))
                mixes |= await _grid(max_rank, engines, names, say)
    if mixes:
        worst = min(mixes, key=lambda mix: float(mixes[mix]["median"]))
        yield Bar("lora_never_slower", mixes[worst]["median"], ">=", 1, {"worst": worst, **mixes[worst], "mixes": mixes})


@asynccontextmanager
async def _server(model: Path, folder: Path, kind: str, max_rank: int, say: Say) -> AsyncIterator[Engine]:
    """Start a server with LoRA, with or without lmaas's plugin. Its log must confirm which."""
    say(f"starting vLLM, max_lora_rank {max_rank}: {kind}")
    options = ("--enable-lora", "--max-lora-rank", str(max_rank), "--max-loras", "8", "--max-cpu-loras", "16")
    async with server(model, folder / f"{kind}-{max_rank}.log", *options, plugins=kind == "ours") as engine:
        if (ACTIVE_MARK in engine.log()) != (kind == "ours"):
            raise RuntimeError(f"the plugin is not where it should be in the server that is {kind}")
        yield engine


async def _loaded(engines: dict[str, Engine], made: dict[str, Path]) -> Iterable[str]:
    for engine in engines.values():
        await engine.load(made)
    return made


async def _figures(engines: dict[str, Engine], load: Load, rounds: int = ROUNDS, first: int = 0) -> dict[str, list[float]]:
    return await interleaved(rounds, {kind: partial(engine.tokens_per_s, load) for kind, engine in engines.items()}, first)


def _detail(figures: dict[str, list[float]], above: str = "ours", below: str = "stock") -> dict[str, Any]:
    return summary(ratios(figures[above], figures[below])) | {"tokens_per_s": {kind: summary(each) for kind, each in figures.items()}}


async def _against_stock(name: str, bar: float, engines: dict[str, Engine], load: Load) -> Bar:
    detail = _detail(await _figures(engines, load)) | {"kernel": _kernel(engines["ours"])}
    return Bar(name, detail["median"], ">=", bar, detail)


def _kernel(engine: Engine) -> str:
    line = next(line for line in engine.log().splitlines() if ACTIVE_MARK in line)
    return line[line.rindex("(") + 1 :].rstrip(")")


async def _against_base(model: Path, folder: Path, ours: Engine, models: Sequence[str], say: Say) -> Bar:
    say("starting vLLM without LoRA")
    async with server(model, folder / "base.log") as base:
        runs = {
            "eight adapters": partial(ours.tokens_per_s, replace(DECODE, models=models)),
            "one adapter": partial(ours.tokens_per_s, replace(DECODE, models=models[:1])),
            "base requests": partial(ours.tokens_per_s, replace(DECODE, models=[BASE])),
            "without LoRA": partial(base.tokens_per_s, replace(DECODE, models=[BASE])),
        }
        figures = await interleaved(ROUNDS, runs)
    detail = _detail(figures, "eight adapters", "without LoRA")
    detail |= {
        f"{name} ÷ without LoRA": summary(ratios(figures[name], figures["without LoRA"])) for name in ("one adapter", "base requests")
    }
    detail |= {"aim": 0.7, "kernel": _kernel(ours), "without LoRA": "the same options, eager as lmaas runs it, and no --enable-lora"}
    return Bar("adapters_vs_base", detail["median"], ">=", None, detail)


async def _grid(rank: int, engines: dict[str, Engine], models: Sequence[str], say: Say) -> dict[str, dict[str, Any]]:
    """Return the ratios of every mix of these adapters and of base requests, by the mix's description."""
    whose = {
        "base requests": [BASE], "1 adapter": models[:1], "2 adapters": models[:2], "8 adapters": models,
        "8 adapters and base requests": [name for model in models for name in (model, BASE)],
    }  # fmt: skip
    result = {}
    for (who, used), (at_once, loads), number in itertools.product(whose.items(), GRID.items(), (0, 1)):
        load = replace(loads[number], models=used)
        figures = await _figures(engines, load)
        if median(ratios(figures["ours"], figures["stock"])) < CLOSE:
            more = await _figures(engines, load, CLOSE_ROUNDS - ROUNDS, ROUNDS)
            figures = {kind: figures[kind] + more[kind] for kind in figures}
        mix = f"rank {rank}, {who}, {('decode', 'prefill')[number]}, {at_once} at a time"
        result[mix] = _detail(figures)
        say(f"{mix}: {result[mix]['median']:.3f}")
    return result


async def _isolation(engines: dict[str, Engine], models: Sequence[str]) -> Bar:
    """Measure the share of greedy answers that are the same alone and in a batch. Half of them are the base model's, the others use all
    adapters."""
    places = ("Paris", "Rome", "the Nile", "Japan", "the Moon", "Peru", "Oslo", "the Alps", "Mars", "Cairo", "Lima", "Texas", "Kyoto", "Ur")
    prompts = [f"The history of {place} begins with" for place in places] + ["Once upon a time", "A recipe for bread:"]
    asks = [(model, prompt) for i, prompt in enumerate(prompts) for model in (BASE, models[i % len(models)])]
    alone = {kind: {ask: await _answer(engine, ask) for ask in asks} for kind, engine in engines.items()}
    changed = sum(alone["ours"][base] != alone["ours"][adapted] for base, adapted in zip(asks[::2], asks[1::2], strict=True))
    if changed < 0.8 * len(prompts):
        raise RuntimeError(f"the adapters change {changed} of {len(prompts)} answers: too little to see whether they are kept apart")

    async def share(kind: str, number: int) -> float:
        order = random.Random(number).sample(asks, len(asks))  # noqa: S311 (an order, not a secret)
        answers = await asyncio.gather(*(_answer(engines[kind], ask) for ask in order))
        return sum(alone[kind][ask] == answer for ask, answer in zip(order, answers, strict=True)) / len(asks)

    shares = await interleaved(ROUNDS, {kind: partial(share, kind) for kind in engines})
    detail = {**summary(shares["ours"]), "answers": ROUNDS * len(asks), "changed_by_adapters": changed, "stock": summary(shares["stock"])}
    # The share over all rounds, because an answer that differs in any round is a defect.
    return Bar("lora_isolation", sum(shares["ours"]) / ROUNDS, "=", 1, detail)


async def _answer(engine: Engine, ask: tuple[str, str]) -> str:
    return str(json.loads(await engine.complete(*ask, 32))["choices"][0]["text"])
