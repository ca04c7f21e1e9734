"""Measures the profile of an engine for the simulation, through the running service."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median

from bench.bill.service import Service
from bench.client import Answer, Ask, Client, Place
from bench.frame import Say
from lmaas.api import table
from lmaas.simulation.profile import Profile
from lmaas.states import EnginePhase

#: The numbers of concurrent requests with which the length of a step is measured.
CROWDS = (1, 4, 8, 12)
SHORT, COMPLETION = 16, 48
#: Prompt sizes that occur in traces. Much longer prompts take longer per token.
PROMPTS = (16, 96, 224, 384)
TIMES = 6


def prompt(seed: int, tokens: int) -> list[int]:
    """Return random tokens, so that no cache contains a part of them."""
    chance = random.Random(seed)  # noqa: S311 (prompts, not secrets)
    return [chance.randrange(1000, 40000) for _ in range(tokens)]


async def fit(asker: Client, service: Service, say: Say) -> Profile:
    """Measure the profile of this machine's engines by requests to the shared pool, which is empty before and afterwards."""
    places = [each.shared for each in service.places.values()]
    await asker.ask(Ask(places[0], prompt(0, SHORT), 2))
    [replica] = await service.replicas([service.shared])
    for place in places:
        await asker.ask(Ask(place, prompt(1, SHORT), 2))  # each adapter has been loaded after this
    crowds = {size: await _crowd(asker, places, size) for size in CROWDS}
    step_s, step_sequence_s = line(list(crowds), list(crowds.values()))
    waits: dict[int, list[float]] = {tokens: [] for tokens in PROMPTS}
    for seed in range(TIMES):
        for tokens in PROMPTS:  # in turn, so that other work on the machine affects all sizes equally
            waits[tokens].append(await _ttft(asker, places[0], seed, tokens))
    first_s, token_s = line(PROMPTS, [median(each) for each in waits.values()])
    await asyncio.to_thread(service.operator.send, table.STOP_REPLICA, replica=replica.id)
    stopping = asyncio.get_running_loop().time()
    await service.gone()
    stopped_s = asyncio.get_running_loop().time() - stopping
    start_s = (await service.engine_ms([service.shared]))[EnginePhase.STARTING] / 1000
    [replica] = await service.replicas([service.shared])
    if replica.ready_at is None:
        raise RuntimeError("the engine was never ready")
    sizes = service.sizes()
    profile = replace(
        sizes,
        spawn_s=max(0.0, (replica.ready_at - replica.created_at).total_seconds() - start_s),
        start_s=start_s,
        stop_s=max(0.0, stopped_s - sizes.notice_s),
        # The step of a first token runs no other request.
        overhead_s=max(0.0, first_s - step_s),
        step_s=step_s,
        step_sequence_s=step_sequence_s,
        prefill_tokens_per_s=1 / max(1e-6, token_s),
    )
    say(f"measured: {profile}")
    return profile


async def _crowd(asker: Client, places: Sequence[Place], size: int) -> float:
    """Return the seconds per token of `size` concurrent requests."""

    async def one(number: int) -> Answer:
        return await asker.ask(Ask(places[number % len(places)], prompt(number, SHORT), COMPLETION))

    found = []
    for _ in range(2):
        answers = await asyncio.gather(*(one(number) for number in range(size)))
        found += [(answer.total_s - answer.ttft_s) / (COMPLETION - 1) for answer in answers]
    return median(found)


async def _ttft(asker: Client, place: Place, seed: int, tokens: int) -> float:
    return (await asker.ask(Ask(place, prompt(seed, tokens), 1))).ttft_s


def line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Fit a straight line through these points (least squares). Return the seconds at 0 and the seconds per unit; neither is negative."""
    mean_size, mean_s = fmean(sizes), fmean(seconds)
    covariance = sum((size - mean_size) * (each - mean_s) for size, each in zip(sizes, seconds, strict=True))
    slope = max(0.0, covariance / sum((size - mean_size) ** 2 for size in sizes))
    return max(1e-4, mean_s - slope * mean_size), slope
