"""Compares the first token of a request on an empty pool with that of a stock vLLM server that is started for it."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

from bench import engines
from bench.client import Ask, client
from bench.frame import ROUNDS, Bar, Say, attempted, interleaved, ratios, summary
from bench.stack import Stack, stack
from lmaas.process import bound_command

NAMES = ("cold_start", "cold_start_busy", "first_request", "first_request_busy")
#: The shortest timeout after which a pool becomes empty.
IDLE_S = 1
#: The request to the service. Stock servers get a shorter one.
PROMPT, TOKENS = "What is the capital of France? This is question {}.", 4
#: The options that lmaas gives its own engines by default.
OPTIONS = ("--enable-lora", "--max-loras", "8", "--max-cpu-loras", "64", "--max-lora-rank", "16")
SIZES = ("--max-num-seqs", "16", "--kv-cache-memory-bytes", str(1 << 30))
#: The number of processes that never sleep, which simulate other work on a busy machine.
BUSY_LOOPS = 2
#: The tenant of a service that has just been started.
TENANT = "first"


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the requested bars of NAMES."""
    for name in NAMES:
        if name in wanted:
            beside = _busy_loops() if name.endswith("_busy") else contextlib.nullcontext()
            measured = _cold_start if name.startswith("cold_start") else _first_request
            yield await attempted(name, measured(name, model, folder / name, beside, say))


async def _cold_start(name: str, model: Path, folder: Path, beside: AbstractContextManager[None], say: Say) -> Bar:
    """Measure the time from a stock server's start to its first token ÷ the time from a request on an empty pool to its first token."""
    say(f"{name}: a service with an empty pool, and stock servers started one after the other")
    records: list[dict[str, Any]] = []
    with beside:
        async with stack(model, folder / "home", idle_timeout_s=IDLE_S) as running, client() as asker:
            place = running.base(await running.tenant("cold"))

            async def ours(number: int) -> float:
                await _empty(running)
                answer = await asker.ask(Ask(place, PROMPT.format(number), TOKENS))
                records.extend(row["start"] for row in await running.replicas() if row["start"])
                return answer.ttft_s

            async def stock(number: int) -> float:
                await _empty(running)
                return await _stock_start(model, folder / f"stock-{number}.log")

            # The first round fills the machine's caches, and the zygote finishes its imports.
            await interleaved(1, {"stock": stock, "ours": ours}, first=-1)
            records.clear()
            figures = await interleaved(ROUNDS, {"stock": stock, "ours": ours})
    detail: dict[str, Any] = summary(ratios(figures["stock"], figures["ours"]))
    detail |= {"stock_s": summary(figures["stock"]), "ours_s": summary(figures["ours"]), "starts": records}
    return Bar(name, detail["median"], ">=", 6 if name.endswith("_busy") else 9.5, detail)


async def _first_request(name: str, model: Path, folder: Path, beside: AbstractContextManager[None], say: Say) -> Bar:
    """Measure the time from the message "is up" of a service to the first token of an immediate request ÷ the time from a stock server's
    start to its first token. The service is started in a new home (`new`), and in a used one (`again`), where it is up sooner and has had
    less time to prepare. The larger ratio counts."""
    say(f"{name}: services and stock servers started one after the other")
    tenants, records = _one_tenant(folder / "tenants"), {"new": list[dict[str, Any]](), "again": list[dict[str, Any]]()}

    async def first_token_s(home: Path, kind: str) -> float:
        async with client() as asker, stack(model, home, tenants=tenants) as running:
            answer = await asker.ask(Ask(running.known(TENANT), PROMPT.format(0), TOKENS))
            records[kind].extend(row["start"] | {"up_s": running.up_s} for row in await running.replicas() if row["start"])
            return answer.ttft_s

    async def new(number: int) -> float:
        return await first_token_s(folder / f"new-{number}", "new")

    async def again(_: int) -> float:
        return await first_token_s(folder / "again", "again")

    async def stock(number: int) -> float:
        return await _stock_start(model, folder / f"stock-{number}.log")

    with beside:
        runs = {"stock": stock, "new": new, "again": again}
        await interleaved(1, runs, first=-1)
        for kept in records.values():
            kept.clear()
        figures = await interleaved(ROUNDS, runs)
    by_kind = {kind: summary(ratios(figures[kind], figures["stock"])) for kind in ("new", "again")}
    detail: dict[str, Any] = max(by_kind.values(), key=lambda each: each["median"])
    detail = detail | by_kind | {f"{kind}_s": summary(taken) for kind, taken in figures.items()} | {"starts": records}
    return Bar(name, detail["median"], "<=", None if name.endswith("_busy") else 0.6, detail)


def _one_tenant(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / f"{TENANT}.yaml").write_text(f"name: {TENANT}\n")
    return folder


@contextmanager
def _busy_loops() -> Iterator[None]:
    """Keep BUSY_LOOPS processors busy during the block."""
    loops = [Popen(bound_command([sys.executable, "-c", "while True: pass"])) for _ in range(BUSY_LOOPS)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


async def _stock_start(model: Path, log: Path) -> float:
    """Return the seconds from the start of a stock server to its first token. The server is polled."""
    began = time.perf_counter()
    async with engines.server(model, log, *OPTIONS, *SIZES, plugins=False):
        return time.perf_counter() - began


async def _empty(running: Stack) -> None:
    """Wait until no replica is left."""
    async with asyncio.timeout(120):
        while True:
            if not await running.replicas():
                return
            await asyncio.sleep(0.2)
