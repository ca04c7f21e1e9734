"""Engines for the contract test, vLLM and its fake, behind a small client."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmaas.config import Settings
from lmaas.engine.launch import EngineProcess, EngineSpec
from tests.support.collector import Collector, collector
from tests.support.conditions import until
from tests.system.engine.running import running
from tests.system.engine.zygote.place import zygote_in

ADAPTER = Path(__file__).parents[3] / "tenants" / "adapters" / "acme-json"
BASE = "base-of-the-contract"
MAX_LEN = 2048
CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETION])
STREAM = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
#: The tokens of a prompt that suits any tokenizer.
TOKENS = [100 + number % 700 for number in range(300)]


@dataclass(frozen=True)
class Counters:
    """The engine's counters."""

    prompt: int
    generated: int
    running: int
    waiting: int

    def since(self, earlier: "Counters") -> tuple[int, int]:
        """Return the prompt and generated tokens since earlier counters."""
        return self.prompt - earlier.prompt, self.generated - earlier.generated


@dataclass
class Events:
    """A stream as it was received: the events' bytes, and their JSON without `[DONE]`."""

    raw: list[bytes] = field(default_factory=list)
    parsed: list[dict[str, Any]] = field(default_factory=list)

    def add(self, line: str) -> None:
        """Add one line of the stream."""
        if line:
            assert line.startswith("data: ")
            self.raw.append(line.encode())
            if line != "data: [DONE]":
                self.parsed.append(json.loads(line.removeprefix("data: ")))

    @property
    def of_choices(self) -> list[dict[str, Any]]:
        """Return the events without the last one, which has only the usage."""
        return [event for event in self.parsed if event["choices"]]

    def text(self, index: int = 0) -> str:
        """Return the text of one choice."""
        parts = [choice for event in self.of_choices for choice in event["choices"] if choice["index"] == index]
        return "".join(part["text"] if "text" in part else part["delta"].get("content", "") for part in parts)

    def finish_reasons(self) -> dict[int, str]:
        """Return the finish reason of each choice."""
        choices = [choice for event in self.of_choices for choice in event["choices"]]
        return {choice["index"]: choice["finish_reason"] for choice in choices if choice["finish_reason"]}


@dataclass
class Engine:
    """The engine under test."""

    process: EngineProcess
    http: httpx.AsyncClient
    spec: EngineSpec

    async def post(self, path: str, body: object, request_id: str = "one") -> httpx.Response:
        """Send a request."""
        return await self.http.post(path, json=body, headers={"x-request-id": request_id})

    async def stream(self, path: str, body: object, request_id: str = "one", into: Events | None = None) -> Events:
        """Send a streaming request and read the stream to its end."""
        events = Events() if into is None else into
        async with self.http.stream("POST", path, json=body, headers={"x-request-id": request_id}) as response:
            assert response.status_code == 200, await response.aread()
            assert response.headers["content-type"].startswith("text/event-stream")
            async for line in response.aiter_lines():
                events.add(line)
        return events

    async def counters(self) -> Counters:
        """Read the counters from `/metrics`."""
        text = (await self.http.get("/metrics")).text

        def total(name: str) -> int:
            return round(sum(float(value) for value in re.findall(rf"^vllm:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)))

        return Counters(
            total("prompt_tokens_total"), total("generation_tokens_total"), total("num_requests_running"), total("num_requests_waiting")
        )

    async def idle(self) -> Counters:
        """Wait until no sequence runs."""

        async def settled() -> bool:
            counters = await self.counters()
            return counters.running == counters.waiting == 0

        await until(settled)
        return await self.counters()

    async def runs(self, sequences: int) -> None:
        """Wait until this many sequences run and have generated tokens."""
        before = await self.counters()

        async def running() -> bool:
            counters = await self.counters()
            return counters.running >= sequences and counters.generated > before.generated

        await until(running)


@pytest.fixture(scope="module")
def vllm_args() -> str:
    """Further arguments for vLLM, which a module of tests may replace."""
    return ""


@pytest.fixture(scope="module")
def collected() -> Iterator[Collector]:
    """A collector, to which the engines send their spans."""
    with collector() as collected:
        yield collected


@pytest.fixture(scope="module", params=["fake", "vllm"])
async def engine(
    vllm_args: str, collected: Collector, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Engine]:
    """A running engine with 8 slots. vLLM is forked by a zygote, as in a service. Other tests cover plain starts (README.md)."""
    fake = request.param == "fake"
    spec = EngineSpec(
        traces_url=collected.url,
        module="lmaas.testing.fake_engine" if fake else Settings().engine_module,
        source="no-model" if fake else str(request.getfixturevalue("model_folder")),
        name=BASE,
        dtype="float32",
        max_model_len=MAX_LEN,
        max_num_seqs=8,
        max_loras=2,
        max_lora_rank=16,
        max_cpu_loras=4,
        kv_cache_bytes=512 * 1024 * 1024,
        extra_args="--fake-token-ms 10" if fake else vllm_args,
    )
    async with AsyncExitStack() as stack:
        home = None if fake else (await stack.enter_async_context(zygote_in(tmp_path_factory.mktemp("home")))).home
        process, http, _ = await stack.enter_async_context(running(spec, tmp_path_factory.mktemp("engine") / "engine.log", home))
        yield Engine(process, http, spec)


def ask(path: str, words: str = "Count from one to ten.", *, tokens: int = 8, **more: Any) -> dict[str, Any]:
    """Return a request that generates exactly `tokens` tokens for each choice."""
    prompt = {"messages": [{"role": "user", "content": words}]} if path == CHAT else {"prompt": words}
    return {"model": BASE, "max_tokens": tokens, "ignore_eos": True, **prompt, **more}


def engine_ids(path: str, request_id: str) -> list[str]:
    return [f"chatcmpl-{request_id}"] if path == CHAT else [f"cmpl-{request_id}-0"]


def total(usage: dict[str, Any]) -> tuple[int, int]:
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    return usage["prompt_tokens"], usage["completion_tokens"]
