"""A streaming client of OpenAI's API that measures times, with lmaas or directly at an engine."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise

import aiohttp

_TIMEOUT_S = 600


@dataclass(frozen=True)
class Place:
    """A model at an address that ends in `/v1`."""

    url: str
    model: str
    key: str | None = None


@dataclass(frozen=True)
class Ask:
    """A request for an exact number of tokens. A text `prompt` is sent as a chat's message, token ids as a completion."""

    place: Place
    prompt: str | Sequence[int]
    completion_tokens: int


@dataclass(frozen=True)
class Answer:
    """The times of the first visible token and of the last one, in seconds since the request was sent, and the times between tokens."""

    ttft_s: float
    total_s: float
    completion_tokens: int
    gaps_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class Run:
    """The answers to a load, and its total time."""

    answers: Sequence[Answer]
    took_s: float

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens per second."""
        return sum(answer.completion_tokens for answer in self.answers) / self.took_s

    def ttft_s(self, percent: float) -> float:
        """Return this percentile of the times to first token."""
        return percentile([answer.ttft_s for answer in self.answers], percent)


def percentile(figures: Sequence[float], percent: float) -> float:
    """Return the percentile of the figures by nearest rank."""
    return sorted(figures)[max(0, math.ceil(len(figures) * percent / 100) - 1)]


class Client:
    """Sends requests and reads their streams. Connections are kept, as OpenAI's own client does."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http

    async def ask(self, ask: Ask) -> Answer:
        """Send a request and read its stream to the end. Raises RuntimeError if the answer is incomplete."""
        place, chat = ask.place, isinstance(ask.prompt, str)
        said = {"messages": [{"role": "user", "content": ask.prompt}]} if chat else {"prompt": list(ask.prompt)}
        body = {"model": place.model, "max_tokens": ask.completion_tokens, "temperature": 0, "ignore_eos": True, **said}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        headers = {"authorization": f"Bearer {place.key}"} if place.key else {}
        path = "/chat/completions" if chat else "/completions"
        sent, arrived, last, before = time.perf_counter(), list[float](), b"", b""
        async with self._http.post(place.url + path, json=body, headers=headers) as response:
            if response.status != 200:
                raise RuntimeError(f"{place.url} answered {response.status}: {(await response.read())[:500]!r}")
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                if _says_something(line):
                    arrived.append(time.perf_counter())
                before, last = last, line
        ended = time.perf_counter()
        usage = json.loads(before[6:]).get("usage") if before and last.startswith(b"data: [DONE]") else None
        if not arrived or usage is None or usage["completion_tokens"] != ask.completion_tokens:
            raise RuntimeError(f"{place.url} did not answer in full: {before[:500]!r} {last[:500]!r}")
        gaps = tuple(later - earlier for earlier, later in pairwise(arrived))
        return Answer(arrived[0] - sent, ended - sent, ask.completion_tokens, gaps)

    async def run(self, asks: Sequence[Ask], at_once: int) -> Run:
        """Send all requests in order, with `at_once` of them open at any time. Each answer is followed by the next request."""
        waiting = iter(asks)
        answers: list[Answer] = []

        async def worker() -> None:
            for ask in waiting:
                answers.append(await self.ask(ask))

        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(worker())
        return Run(answers, time.perf_counter() - started)

    async def embed(self, place: Place, texts: Sequence[str]) -> None:
        """Have these texts embedded. Raises RuntimeError if the answer is incomplete."""
        body = {"model": place.model, "input": list(texts), "encoding_format": "base64"}
        headers = {"authorization": f"Bearer {place.key}"} if place.key else {}
        async with self._http.post(f"{place.url}/embeddings", json=body, headers=headers) as response:
            content = await response.read()
        if response.status != 200 or content.count(b'"embedding":"') != len(texts):
            raise RuntimeError(f"{place.url} answered {response.status}: {content[:500]!r}")

    async def embed_all(self, place: Place, requests: Sequence[Sequence[str]], at_once: int) -> None:
        """Send a request for each list of texts, with `at_once` of them open at any time."""
        waiting = iter(requests)

        async def worker() -> None:
            for texts in waiting:
                await self.embed(place, texts)

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(worker())


def _says_something(line: bytes) -> bool:
    if line.startswith(b"data: [DONE]"):
        return False
    event = json.loads(line[6:])
    if "error" in event:
        raise RuntimeError(f"the stream has failed: {event['error']}")
    return any(choice.get("text") or choice.get("delta", {}).get("content") for choice in event["choices"])


@asynccontextmanager
async def client() -> AsyncIterator[Client]:
    """Yield a client whose connections are closed at the end."""
    # vLLM closes an idle connection after 5 s. A shorter timeout ensures that no request uses a connection that is being closed.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)) as http:
        yield Client(http)
