"""The measured processes, and the process that generates the load."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.gateways.protocols import PROTOCOLS
from lmaas.process import bound_command

#: The checkout of this benchmark.
TREE = Path(__file__).parents[2]
STOP_S = 20
START_S = 180


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Running:
    """A process of the benchmark with its log."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process, self._log = process, log
        self._observed = psutil.Process(process.pid)

    def cpu_s(self) -> float:
        """Return the CPU time of the process and its children so far, in seconds."""
        family = [self._observed, *self._observed.children(recursive=True)]
        return float(sum(sum(member.cpu_times()[:4]) for member in family))

    def resident_mb(self) -> float:
        """Return its resident memory, in MB of a million bytes."""
        return float(self._observed.memory_info().rss) / 1e6

    def last_words(self) -> str:
        """Return the end of its log."""
        return self._log.read_text(errors="replace")[-2000:]


@contextmanager
def core_of_its_own(measured: Sequence[Running]) -> Iterator[bool]:
    """Reserve the machine's last core for the measured processes, of which only one may work at a time, and the other cores for the other
    children of this process. Postgres, which is not a child process, keeps its cores. Yields False if this is not possible."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
    if len(cores) < 2:
        yield False
        return
    theirs = {max(cores)}
    try:
        _keep_to(theirs, [each.process.pid for each in measured], cores - theirs)
        yield True
    finally:
        _keep_to(cores, [], cores)


def _keep_to(theirs: set[int], measured: Sequence[int], others: set[int]) -> None:
    myself = psutil.Process()
    for process in [myself, *myself.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for thread in process.threads():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, theirs if process.pid in measured else others)


@asynccontextmanager
async def running(
    command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None, tree: Path = TREE
) -> AsyncIterator[Running]:
    """Run a command in a checkout until the end of the block. It also ends if this process dies."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *bound_command(list(command)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | dict(variables or {}),
            cwd=tree,
        )
    try:
        yield Running(process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


@dataclass(frozen=True)
class Proxy:
    """A proxy in front of the engine, or the engine itself, with the request to send and its headers."""

    running: Running
    url: str
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def order(self, *, stream: bool, connections: int, seconds: float) -> dict[str, Any]:
        """Return an order for the load process. The request is the same for all proxies."""
        body = PROTOCOLS["chat"].body(self.model, stream=stream)
        return {"url": self.url, "headers": dict(self.headers), "body": body, "connections": connections, "seconds": seconds}


class Load:
    """The load process. Created by `loading`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out one order. Raises RuntimeError if an answer was wrong."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the load process has no pipes")
        stdin.write(json.dumps(order).encode() + b"\n")
        await stdin.drain()
        line = await stdout.readline()
        if not line:
            raise RuntimeError("the load process ended")
        result: dict[str, Any] = json.loads(line)
        if "error" in result:
            raise RuntimeError(result["error"])
        return result

    async def until_right(self, proxy: Proxy, timeout_s: float = START_S) -> None:
        """Wait until the proxy's answers are correct, plain and streaming. Raises RuntimeError if they are not in time, or if the proxy
        ends."""
        for stream in (False, True):
            order = proxy.order(stream=stream, connections=1, seconds=0)
            try:
                async with asyncio.timeout(timeout_s):
                    while True:
                        try:
                            await self.ask(order)
                            break
                        except RuntimeError as error:
                            wrong = str(error)
                        if proxy.running.process.returncode is not None:
                            raise RuntimeError(f"it ended: {proxy.running.last_words()}")
                        await asyncio.sleep(0.3)
            except TimeoutError:
                raise RuntimeError(f"no right answer in {timeout_s:.0f} s: {wrong}") from None


@asynccontextmanager
async def loading() -> AsyncIterator[Load]:
    """Run a load process for the block."""
    process = await asyncio.create_subprocess_exec(
        *bound_command([sys.executable, "-m", "bench.gateways.load"]),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=TREE,
    )
    try:
        yield Load(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
