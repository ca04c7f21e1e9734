"""Measures what a batch does to interactive requests beside it, and how much of an engine it uses."""

import asyncio
import contextlib
import json
import random
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp

from bench.client import Answer, Ask, Client, Place, client
from bench.frame import ROUNDS, Bar, Say, attempted, interleaved, ratios, summary
from bench.stack import Stack, stack
from lmaas.config import Settings
from lmaas.process import bound_command

NAMES = ("batch_harvest", "batch_interference_ttft", "batch_interference_itl", "batch_vs_offline")
#: The part of the engine's tokens that interactive requests use.
PART = 1 / 3
#: The lengths of the prompts (numbers of two digits, each of about three tokens) and of the answers (tokens), of batches and interactive
#: requests alike.
WORDS, TOKENS = (6, 60), (16, 96)
#: The seconds before a window, in which the load reaches its usual state, and those of a window.
WARM_S, WINDOW_S = 8.0, 20.0
#: The number of lines of a batch that is measured alone.
LINES = 64
_END_S = 300


@dataclass
class Side:
    """The running service, the engine behind it, and the two tenants' models."""

    asker: Client
    http: aiohttp.ClientSession
    running: Stack
    interactive: Place
    batch: Place
    engine: str
    slots: int
    _seeds: int = 0

    def chance(self) -> random.Random:
        """Return a new source of random numbers, so that no prompt is sent twice."""
        self._seeds += 1
        return random.Random(self._seeds)  # noqa: S311 (prompts, not secrets)

    async def metric(self, name: str) -> float:
        """Return the sum of a metric of the engine."""
        async with self.http.get(f"{self.engine}/metrics") as response:
            text = await response.text()
        return sum(float(value) for value in re.findall(rf"^vllm:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE))

    async def until(self, metric: str, holds: Callable[[float], bool]) -> None:
        """Wait for a metric of the engine."""
        async with asyncio.timeout(_END_S):
            while not holds(await self.metric(metric)):  # noqa: ASYNC110 (the engine is another process)
                await asyncio.sleep(0.1)

    async def tokens_per_s(self) -> float:
        """Return the tokens that the engine generates in a second, over a window."""
        before, began = await self.metric("generation_tokens_total"), asyncio.get_running_loop().time()
        await asyncio.sleep(WINDOW_S)
        return (await self.metric("generation_tokens_total") - before) / (asyncio.get_running_loop().time() - began)


@dataclass
class Window:
    """The measurements of one window."""

    tokens_per_s: float
    answers: list[Answer] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """The median time to the first token."""
        return median(answer.ttft_s for answer in self.answers)

    @property
    def itl_s(self) -> float:
        """The median time between two tokens."""
        return median(gap for answer in self.answers for gap in answer.gaps_s)


def prompt(chance: random.Random) -> str:
    """Return a random prompt. Most numbers of two digits are two or three tokens."""
    return " ".join(str(chance.randrange(10, 100)) for _ in range(chance.randint(*WORDS)))


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the requested bars of NAMES on one engine."""
    if not wanted:
        return
    async with _serving(model, folder / "home", say) as side:
        if together := [name for name in NAMES[:3] if name in wanted]:
            say("a batch beside interactive requests")
            for bar in await _together(side, say):
                if bar.name in together:
                    yield bar
        if NAMES[3] in wanted:
            say("a batch alone, and vLLM's run-batch")
            yield await attempted(NAMES[3], _vs_offline(side, model, folder))


@asynccontextmanager
async def _serving(model: Path, home: Path, say: Say) -> AsyncIterator[Side]:
    say("starting lmaas")
    async with stack(model, home) as running, client() as asker, aiohttp.ClientSession() as http:
        await running.keep_one_engine()
        interactive, batch = running.base(await running.tenant("interactive")), running.base(await running.tenant("batch"))
        await asker.ask(Ask(interactive, "Hello", 2))
        yield Side(asker, http, running, interactive, batch, await running.engine_url(), Settings().engine_max_num_seqs)


async def _together(side: Side, say: Say) -> list[Bar]:
    """Measure windows in turn: the engine's most, interactive requests alone, and interactive requests beside a batch."""
    most = await _most(side)
    rate = most.tokens_per_s * PART / (sum(TOKENS) / 2)
    say(f"the engine makes {most.tokens_per_s:.0f} tokens/s; {rate:.2f} interactive requests/s")

    async def alone(_: int) -> Window:
        return await _interactive(side, rate)

    async def both(_: int) -> Window:
        # Twice as many lines as the engine can complete in that time.
        count = int(2 * most.tokens_per_s * (WARM_S + WINDOW_S + 10) / (sum(TOKENS) / 2)) + side.slots
        async with _batch(side, batch_file(side.batch.model, count, side.chance())):
            await side.until("num_requests_running", lambda number: number >= side.slots / 2)
            return await _interactive(side, rate)

    figures = await interleaved(ROUNDS, {"most": lambda _: _most(side), "alone": alone, "both": both})
    detail: dict[str, Any] = {
        "tokens_per_s": {name: summary([window.tokens_per_s for window in each]) for name, each in figures.items()},
        "ttft_s": {name: summary([window.ttft_s for window in figures[name]]) for name in ("alone", "both")},
        "itl_s": {name: summary([window.itl_s for window in figures[name]]) for name in ("alone", "both")},
        "interactive requests": {name: sum(len(window.answers) for window in figures[name]) for name in ("alone", "both")},
    }

    def ratio(above: str, below: str, of: Callable[[Window], float]) -> dict[str, float | int]:
        return summary(ratios([of(window) for window in figures[above]], [of(window) for window in figures[below]]))

    harvest = ratio("both", "most", lambda window: window.tokens_per_s)
    ttft, itl = ratio("both", "alone", lambda window: window.ttft_s), ratio("both", "alone", lambda window: window.itl_s)
    return [
        Bar(NAMES[0], harvest["median"], ">=", 0.95, harvest | detail),
        Bar(NAMES[1], ttft["median"], "<=", 1.25, ttft | detail),
        Bar(NAMES[2], itl["median"], "<=", 2, itl | detail),
    ]


async def _most(side: Side) -> Window:
    """Send as many requests as keep all slots taken, directly to the engine."""
    place = Place(f"{side.engine}/v1", side.running.base_model)

    async def worker() -> None:
        chance = side.chance()
        while True:
            await side.asker.ask(Ask(place, prompt(chance), chance.randint(*TOKENS)))

    async with _tasks([worker() for _ in range(2 * side.slots)]):
        await asyncio.sleep(WARM_S)
        return Window(await side.tokens_per_s())


async def _interactive(side: Side, rate: float) -> Window:
    """Send interactive requests at random times, and return those of a window."""
    chance, loop = side.chance(), asyncio.get_running_loop()
    begins, window = loop.time() + WARM_S, Window(0.0)

    async def one(ask: Ask) -> None:
        began, answer = loop.time(), await side.asker.ask(ask)
        if began >= begins:
            window.answers.append(answer)

    async def arrivals() -> None:
        async with asyncio.TaskGroup() as group:
            while loop.time() < begins + WINDOW_S:
                await asyncio.sleep(chance.expovariate(rate))
                group.create_task(one(Ask(side.interactive, prompt(chance), chance.randint(*TOKENS))))

    arriving = asyncio.create_task(arrivals(), name="arrivals")
    await asyncio.sleep(WARM_S)
    window.tokens_per_s = await side.tokens_per_s()
    await arriving
    return window


@asynccontextmanager
async def _tasks(working: Sequence[Any]) -> AsyncIterator[None]:
    """Run endless work for a block. If it fails, so does the block."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each) for each in working]
        yield
        for task in tasks:
            task.cancel()


def batch_file(model: str, count: int, chance: random.Random) -> bytes:
    """Return the input file of a batch with this many lines."""
    lines = []
    for number in range(count):
        body = {"model": model, "max_tokens": chance.randint(*TOKENS), "temperature": 0, "ignore_eos": True}
        body["messages"] = [{"role": "user", "content": prompt(chance)}]
        lines.append(json.dumps({"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}))
    return "\n".join(lines).encode() + b"\n"


@asynccontextmanager
async def _batch(side: Side, lines: bytes) -> AsyncIterator[str]:
    """Create a batch, and yield its id. It is cancelled at the end of the block, unless it has ended."""
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", lines, filename="lines.jsonl", content_type="application/jsonl")
    uploaded = await _api(side, "POST", "/files", data=form)
    told = {"input_file_id": uploaded["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    made = await _api(side, "POST", "/batches", json=told)
    try:
        yield made["id"]
    finally:
        if (await _api(side, "GET", f"/batches/{made['id']}"))["status"] not in ENDED:
            await _api(side, "POST", f"/batches/{made['id']}/cancel")
            await _ended(side, made["id"])
        await side.until("num_requests_running", lambda number: number == 0)


ENDED = ("completed", "failed", "expired", "cancelled")


async def _ended(side: Side, batch: str) -> dict[str, Any]:
    """Wait for the end of a batch."""
    async with asyncio.timeout(_END_S):
        while (found := await _api(side, "GET", f"/batches/{batch}"))["status"] not in ENDED:  # noqa: ASYNC110 (the same)
            await asyncio.sleep(0.1)
    return found


async def _api(side: Side, method: str, path: str, **more: Any) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {side.batch.key}"}
    async with side.http.request(method, side.batch.url + path, headers=headers, **more) as response:
        text = await response.text()
    if response.status != 200:
        raise RuntimeError(f"{method} {path} answered {response.status}: {text[:500]}")
    found: dict[str, Any] = json.loads(text)
    return found


async def _vs_offline(side: Side, model: Path, folder: Path) -> Bar:
    """Run the same lines as a batch, timed from its creation to its end, and with `run-batch`, from reading the file to writing its
    answers."""
    async with _offline(side, model, folder / "offline.log") as run_offline:

        async def ours(number: int) -> float:
            lines = files[number].read_bytes()
            began = asyncio.get_running_loop().time()
            async with _batch(side, lines) as batch:
                found = await _ended(side, batch)
                took = asyncio.get_running_loop().time() - began
            if found["status"] != "completed" or found["request_counts"]["completed"] != LINES:
                raise RuntimeError(f"the batch did not complete: {found}")
            return completion_tokens(lines) / took

        async def theirs(number: int) -> float:
            return completion_tokens(files[number].read_bytes()) / await run_offline(files[number])

        files = [folder / f"lines-{number}.jsonl" for number in range(ROUNDS + 1)]
        for path in files:
            path.write_bytes(batch_file(side.batch.model, LINES, side.chance()))
        runs: dict[str, Callable[[int], Awaitable[float]]] = {"lmaas": ours, "run-batch": theirs}
        await asyncio.gather(*(run(ROUNDS) for run in runs.values()))  # opens connections and warms up
        figures = await interleaved(ROUNDS, runs)
    detail: dict[str, Any] = summary(ratios(figures["lmaas"], figures["run-batch"]))
    detail |= {"lines": LINES, "tokens_per_s": {name: summary(each) for name, each in figures.items()}}
    return Bar(NAMES[3], detail["median"], ">=", 0.95, detail)


def completion_tokens(lines: bytes) -> int:
    """Return the completion tokens of a batch, whose answers all have their full length."""
    return sum(json.loads(line)["body"]["max_tokens"] for line in lines.splitlines())


@asynccontextmanager
async def _offline(side: Side, model: Path, log: Path) -> AsyncIterator[Callable[[Path], Awaitable[float]]]:
    """Start vLLM's `run-batch` with an engine like that of lmaas, but without adapters. Yields a function that runs a file and returns the
    seconds that it took."""
    command = [sys.executable, "-m", "bench.offline", "--model", str(model), "--served-model-name", side.batch.model, "--enforce-eager"]
    command += ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", str(side.slots)]
    command += ["--kv-cache-memory-bytes", str(512 << 20)]
    pipe = asyncio.subprocess.PIPE
    async with AsyncExitStack() as exits:
        output = exits.enter_context(log.open("wb"))
        process = await asyncio.create_subprocess_exec(*bound_command(command), stdin=pipe, stdout=pipe, stderr=output)
        stdin, stdout = process.stdin, process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("run-batch has no pipes")

        async def told() -> str:
            while line := await stdout.readline():
                if line.startswith(b"offline: "):
                    return line.decode().removeprefix("offline: ").strip()
            raise RuntimeError(f"run-batch has ended; see {log}")

        async def run(path: Path) -> float:
            stdin.write(f"{path}\n".encode())
            seconds, answers = (await told()).split()
            if int(answers) != LINES:
                raise RuntimeError(f"run-batch answered {answers} of {LINES} lines")
            return float(seconds)

        try:
            await told()
            yield run
        finally:
            # At the end of its input it stops its engine, which would otherwise keep the pipes open.
            stdin.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(60):
                    await process.wait()
