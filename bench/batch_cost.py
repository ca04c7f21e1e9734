"""Measures the cost of a batch of LINES lines beside its tokens: CPU of Postgres, memory of the job runner, seconds of its validation.

The service is that of `bench.gateways`, whose engine costs almost nothing, with a job runner. All lines are chats of one tenant. The batch
is created through the API and its result is downloaded, so that every line is known to have a result. Postgres' CPU is that of all its
processes from the batch's creation to its end, and includes the queries of the idle service. The memory is the largest increase of the
runner's memory since before the batch. One batch takes minutes, so these figures are of one round.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from sqlalchemy import text

from bench.frame import Bar, Say
from bench.gateways.processes import Proxy, Running, loading, running
from bench.gateways.protocols import PROTOCOLS
from bench.gateways.service import Service, service
from lmaas.store.database import Database
from lmaas.store.scopes import SYSTEM

POSTGRES, MEMORY, VALIDATION, RATE = "batch_postgres_cost_ms", "batch_runner_memory_mb", "batch_validation_s", "batch_lines_per_s"
#: The bars; the rate is only reported, because it is that of the machine.
BARS: dict[str, float | None] = {POSTGRES: 0.2, MEMORY: 100.0, VALIDATION: 10.0, RATE: None}
NAMES = tuple(BARS)
LINES = 50_000
ENDPOINT = "/v1/chat/completions"
#: The longest time that a batch may take.
END_S = 1800.0
#: The time between two polls of the batch and the runner.
LOOK_S = 0.2


@dataclass(frozen=True)
class Cost:
    """The figures of one batch. `lines_per_s` are those from the end of the validation to the end of the batch."""

    lines: int
    postgres_s: float
    runner_s: float
    memory_mb: float
    validation_s: float
    lines_per_s: float

    @property
    def figures(self) -> dict[str, float]:
        """The figure of each bar."""
        return {
            POSTGRES: self.postgres_s * 1000 / self.lines,
            MEMORY: self.memory_mb,
            VALIDATION: self.validation_s,
            RATE: self.lines_per_s,
        }


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the requested bars of NAMES."""
    if not wanted:
        return
    say(f"a batch of {LINES} lines")
    cost = await measured(folder, LINES)
    detail = {"lines": cost.lines, "postgres_cpu_s": cost.postgres_s, "runner_cpu_ms_per_line": cost.runner_s * 1000 / cost.lines}
    say(f"{cost}")
    for name in wanted:
        figure = cost.figures[name]
        yield Bar(name, figure, "<=", BARS[name], detail | {"median": figure, "min": figure, "max": figure, "rounds": 1})


async def measured(folder: Path, lines: int) -> Cost:
    """Run a batch of this many lines through a new service."""
    async with loading() as load, service(folder) as ours:
        proxy = await ours.gateway("gateway", "lmaas", "gateway")
        await load.until_right(proxy)
        command = [sys.executable, "-m", "lmaas", "jobs"]
        async with running(command, folder / "jobs.log", ours.settings.environment()) as runner, aiohttp.ClientSession() as http:
            api = Api(http, proxy)
            await _run(api, ours, runner, folder, 200)  # every part has been used once
            return await _run(api, ours, runner, folder, lines)


class Api:
    """The API of a tenant, through a gateway."""

    def __init__(self, http: aiohttp.ClientSession, proxy: Proxy) -> None:
        self._http, self._proxy = http, proxy
        self._root = proxy.url.removesuffix(ENDPOINT)
        self.model = proxy.model

    async def ask(self, method: str, path: str, **content: Any) -> Any:
        """Send a request and return the JSON of the response. Raises RuntimeError if it is an error."""
        async with self._http.request(method, f"{self._root}{path}", headers=self._proxy.headers, **content) as response:
            if response.status != 200:
                raise RuntimeError(f"{method} {path}: {response.status} {(await response.text())[:500]}")
            return await response.json()

    async def count_lines(self, file_id: str) -> int:
        """Return the number of lines of a file."""
        url = f"{self._root}/v1/files/{file_id}/content"
        async with self._http.get(url, headers=self._proxy.headers) as response:
            return sum([chunk.count(b"\n") async for chunk in response.content.iter_any()])


async def _run(api: Api, ours: Service, runner: Running, folder: Path, lines: int) -> Cost:
    path = folder / f"{lines}.jsonl"
    await asyncio.to_thread(path.write_bytes, b"".join(_lines(api.model, lines)))
    with path.open("rb") as content:
        file = await api.ask("POST", "/v1/files", data={"purpose": "batch", "file": content})
    server = await _postgres(ours.db)
    postgres_s, runner_s, memory = _cpu_s(server), runner.cpu_s(), runner.resident_mb()
    most, began, validated = memory, time.perf_counter(), 0.0
    batch = await api.ask("POST", "/v1/batches", json={"input_file_id": file["id"], "endpoint": ENDPOINT, "completion_window": "24h"})
    async with asyncio.timeout(END_S):
        while batch["status"] in ("validating", "in_progress", "finalizing"):
            await asyncio.sleep(LOOK_S)
            most = max(most, runner.resident_mb())
            batch = await api.ask("GET", f"/v1/batches/{batch['id']}")
            if not validated and batch["status"] != "validating":
                validated = time.perf_counter() - began
    took = time.perf_counter() - began
    postgres_s, runner_s = _cpu_s(server) - postgres_s, runner.cpu_s() - runner_s
    if batch["status"] != "completed" or await api.count_lines(batch["output_file_id"]) != lines:
        raise RuntimeError(f"the batch did not complete: {json.dumps(batch)[:1000]}\n{runner.last_words()}")
    return Cost(lines, postgres_s, runner_s, most - memory, validated, lines / (took - validated))


def _lines(model: str, count: int) -> Iterator[bytes]:
    body = PROTOCOLS["chat"].body(model, stream=False)
    for number in range(count):
        yield json.dumps({"custom_id": f"line-{number}", "method": "POST", "url": ENDPOINT, "body": body}).encode() + b"\n"


async def _postgres(db: Database) -> psutil.Process:
    """Return the process of Postgres from which all others come."""
    async with db.begin(SYSTEM) as connection:
        backend = int((await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one())
    parent = psutil.Process(backend).parent()
    if parent is None:
        raise RuntimeError("Postgres has no parent process")
    return parent


def _cpu_s(server: psutil.Process) -> float:
    """Return the CPU seconds of a server and its children, including those that have ended."""
    total = 0.0
    for process in [server, *server.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])
    return total
