"""Compares the throughput of embeddings through a whole service with that of the same requests sent directly to its vLLM."""

import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.client import Client, Place, client
from bench.frame import Bar, Say, attempted, interleaved, ratios, summary
from bench.stack import stack
from lmaas.engine.embedding_model import NAME as MODEL

NAME = "embedding_throughput"
NAMES = (NAME,)
#: The bar is too close to 1 for a few rounds on a machine with other work.
ROUNDS = 11
_WORDS = ("order", "parcel", "shop", "arrived", "yet", "was", "sent", "last", "week", "by", "rail", "to", "Paris", "rains", "autumn")


@dataclass(frozen=True)
class Load:
    """A load of `requests`, `at_once` of them at any time. Each has `inputs` texts of `words` words."""

    requests: int
    at_once: int
    inputs: int
    words: int = 32

    async def run(self, asker: Client, place: Place, seed: int) -> float:
        """Send the requests, and return the texts that were embedded in a second. The same seed gives the same texts."""
        chance = random.Random(seed)  # noqa: S311 (texts, not secrets)
        texts = [[" ".join(chance.choices(_WORDS, k=self.words)) for _ in range(self.inputs)] for _ in range(self.requests)]
        began = time.perf_counter()
        await asker.embed_all(place, texts, self.at_once)
        return self.requests * self.inputs / (time.perf_counter() - began)


#: The requests of building an index, and those of a search. The engine always has more work than it can do at once.
LOADS = {"64 texts in a request": Load(8, 4, 64), "one text in a request": Load(160, 16, 1)}


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the bar if it is requested."""
    if wanted:
        yield await attempted(NAME, _throughput(model, folder / "home", say))


async def _throughput(model: Path, home: Path, say: Say) -> Bar:
    """Measure texts per second with lmaas ÷ directly, for requests with many texts and for requests with one. The worse ratio counts."""
    say("starting lmaas")
    async with stack(model, home) as running, client() as asker:
        await running.keep_one_engine(MODEL)
        through = replace(running.base(await running.tenant("bench")), model=MODEL)
        await asker.embed_all(through, [["Hello"]], 1)
        places = {"lmaas": through, "straight": Place(f"{await running.engine_url()}/v1", MODEL)}
        detail: dict[str, Any] = {}
        for name, load in LOADS.items():
            runs = {way: partial(load.run, asker, place) for way, place in places.items()}
            await interleaved(1, runs, first=-1)
            figures = await interleaved(ROUNDS, runs)
            found = summary(ratios(figures["lmaas"], figures["straight"]))
            say(f"{name}: {found['median']:.3f}")
            detail[name] = found | {"texts_per_s": {way: summary(each) for way, each in figures.items()}, "at_once": load.at_once}
    worst = min(detail, key=lambda name: float(detail[name]["median"]))
    return Bar(NAME, detail[worst]["median"], ">=", 0.95, {"worst": worst, **detail[worst], **detail})
