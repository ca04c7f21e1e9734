"""Compares the first token of a request on an empty pool with that of a stock vLLM server that is started for it."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from bench import engines
from bench.client import Ask, client
from bench.frame import ROUNDS, Bar, Say, attempted, interleaved, ratios, summary
from bench.stack import Stack, stack

NAMES = ("cold_start",)
#: As soon as an empty pool may be empty again.
IDLE_S = 1
#: What is asked for; a stock server is asked for less.
PROMPT, TOKENS = "What is the capital of France? This is question {}.", 4
#: What `lmaas` gives its own engines by default.
OPTIONS = ("--enable-lora", "--max-loras", "8", "--max-cpu-loras", "64", "--max-lora-rank", "16")
SIZES = ("--max-num-seqs", "16", "--kv-cache-memory-bytes", str(1 << 30))


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the bars of NAMES that are wanted."""
    if set(wanted) & set(NAMES):
        yield await attempted(NAMES[0], _cold_start(model, folder, say))


async def _cold_start(model: Path, folder: Path, say: Say) -> Bar:
    say("A service with an empty pool, and stock servers started one after the other")
    records: list[dict[str, Any]] = []
    async with stack(model, folder / "cold", idle_timeout_s=IDLE_S) as running, client() as asker:
        place = running.base(await running.tenant("cold"))

        async def ours(number: int) -> float:
            await _empty(running)
            answer = await asker.ask(Ask(place, PROMPT.format(number), TOKENS))
            records.extend(row["start"] for row in await running.replicas() if row["start"])
            return answer.ttft_s

        async def stock(number: int) -> float:
            await _empty(running)
            return await _stock_start(model, folder / f"stock-{number}.log")

        # The first one finds nothing in the machine's caches; and the zygote has imported by then.
        await interleaved(1, {"stock": stock, "ours": ours}, first=-1)
        records.clear()
        figures = await interleaved(ROUNDS, {"stock": stock, "ours": ours})
    detail: dict[str, Any] = summary(ratios(figures["stock"], figures["ours"]))
    detail |= {"stock_s": summary(figures["stock"]), "ours_s": summary(figures["ours"]), "starts": records}
    return Bar(NAMES[0], detail["median"], ">=", 8, detail)


async def _stock_start(model: Path, log: Path) -> float:
    """Return the seconds from the start of a stock server to its first token. It is asked repeatedly."""
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
