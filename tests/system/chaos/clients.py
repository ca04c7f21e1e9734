"""Clients of many kinds and protocols: patient and impatient ones, and ones that stream, disconnect, send invalid requests and retry."""

import asyncio
import json
import random
from typing import Any

import aiohttp

from lmaas.keys import new_key
from tests.support.verdict import Attempt
from tests.system.chaos.dialects import EMBEDDINGS, TEXT, Dialect
from tests.system.chaos.service import EMBEDDER, Client, Service, now

#: The maximum duration of a request. Its deadline in the queue is 40 s.
HANG_S = 90.0
TRIES = 3
#: The statuses on which an OpenAI client retries.
RETRYABLE = (429, 500, 502, 503, 529)
RESPONSES = "/v1/responses"
KINDS = {
    "plain": 20,
    "stream": 30,
    "long stream": 5,
    "cut mid-stream": 14,
    "cut while waiting": 10,
    "cut plain": 8,
    "invalid": 3,
    "unknown model": 3,
    "unknown key": 2,
}
#: The share of requests with a schema, and the number of schemas. Each new one is checked before an engine receives it.
SCHEMA_SHARE, SCHEMAS = 0.2, 200
#: The share of requests for embeddings, where the service has a pool for them, and of responses that continue an earlier one.
EMBEDDING_SHARE, CONTINUED_SHARE = 0.1, 0.3
#: The number of completion tokens by kind of request, otherwise 5 to 80. At 15 ms per token, a long stream lasts longer than several
#: checkpoints.
TOKENS = {"long stream": (300, 400), "cut mid-stream": (60, 100), "cut while waiting": (60, 100), "cut plain": (60, 100)}


class Worker:
    """Sends one request at a time with its own key, so that its lines in the ledger can be recognised even if the client never received the
    request's id."""

    def __init__(self, service: Service, client: Client, seed: str) -> None:
        self._service, self._client = service, client
        self._random = random.Random(seed)
        self.attempts: list[Attempt] = []
        #: The responses whose end this worker has received, and which the service has therefore stored: their ids and attempts.
        self.stored: list[tuple[str, Attempt]] = []
        self.current: Attempt | None = None

    @property
    def tenant(self) -> str:
        """The name of the worker's tenant."""
        return self._client.tenant

    @property
    def headers(self) -> dict[str, str]:
        """The headers with the worker's key."""
        return {"authorization": f"Bearer {self._client.key}"}

    async def run(self, stop: asyncio.Event) -> None:
        """Send requests until `stop` is set, then finish the running one."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            while not stop.is_set():
                (kind,) = self._random.choices(list(KINDS), list(KINDS.values()))
                dialect, body, key = self._request(kind)
                for _ in range(TRIES):
                    attempt = await self._attempt(session, kind, dialect, body, key)
                    if attempt.cut or not (attempt.broken or attempt.status in RETRYABLE) or stop.is_set():
                        break
                    await asyncio.sleep(self._random.uniform(0.1, 0.5))

    def _request(self, kind: str) -> tuple[Dialect, dict[str, Any], str]:
        stream = kind in ("stream", "long stream", "cut mid-stream") or (kind == "cut while waiting" and self._random.random() < 0.5)
        embeds = self._service.embeds and not stream and self._random.random() < EMBEDDING_SHARE
        (dialect,) = [EMBEDDINGS] if embeds else self._random.choices(list(TEXT), list(TEXT.values()))
        words = " ".join(["word"] * self._random.randint(3, 30))
        body = dialect.body(words, self._random.randint(*TOKENS.get(kind, (5, 80))), stream=stream)
        body["model"] = EMBEDDER if embeds else self._random.choice(self._client.models)
        if self._random.random() < SCHEMA_SHARE:
            body |= dialect.schema({"title": f"schema {self._random.randrange(SCHEMAS)}"})
        if kind == "invalid":
            body["temperature"] = "hot"
        if kind == "unknown model":
            body["model"] = "nobodys-bot"
        if "prompt" in body and stream and self._random.random() < 0.5:
            body["stream_options"] = {"include_usage": True}
        if dialect.path == RESPONSES and self.stored and self._random.random() < CONTINUED_SHARE:
            body["previous_response_id"] = self.stored[-1][0]
        return dialect, body, new_key() if kind == "unknown key" else self._client.key

    async def _attempt(self, session: aiohttp.ClientSession, kind: str, dialect: Dialect, body: dict[str, Any], key: str) -> Attempt:
        gateway = self._random.choice(self._service.gateways)
        attempt = Attempt(kind, self._client.key_id, gateway, body["model"], body.get("stream", False), now())
        self.attempts.append(attempt)
        self.current = attempt
        url = self._service.url(gateway) + dialect.path
        cut_after_s = {"cut while waiting": self._random.uniform(0.005, 0.2), "cut plain": self._random.uniform(0.2, 1.0)}.get(kind)
        cut_after = self._random.randint(1, 40) if kind == "cut mid-stream" else None
        try:
            async with asyncio.timeout(cut_after_s or HANG_S):
                async with session.post(url, json=body, headers={"authorization": f"Bearer {key}"}) as response:
                    attempt.status, attempt.request_id = response.status, response.headers["x-request-id"]
                    if response.status == 200 and attempt.stream:
                        await self._read(response, dialect, attempt, cut_after)
                    else:
                        self._whole(await response.json(), dialect, attempt)
        except TimeoutError:
            attempt.cut, attempt.hung = cut_after_s is not None, cut_after_s is None
        except aiohttp.ClientConnectorError:
            attempt.broken = attempt.refused = True
        except (aiohttp.ClientError, ConnectionError):
            attempt.broken = True
        attempt.ended = now()
        self.current = None
        if attempt.done and dialect.path == RESPONSES and attempt.request_id is not None:
            self.stored.append((attempt.request_id.replace("req_", "resp_"), attempt))
        return attempt

    async def _read(self, response: aiohttp.ClientResponse, dialect: Dialect, attempt: Attempt, cut_after: int | None) -> None:
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]\n":
                attempt.done = True
                return
            if dialect.read_event(json.loads(line[6:]), attempt):
                return
            if cut_after is not None and attempt.tokens >= cut_after:
                attempt.cut = True
                response.close()
                return
        # The stream ended without an error event.
        attempt.broken = True

    def _whole(self, answer: dict[str, Any], dialect: Dialect, attempt: Attempt) -> None:
        if answer.get("error"):
            attempt.code = answer["error"]["code"]
            return
        attempt.tokens = dialect.completion_tokens(answer)
        attempt.done, attempt.usage = True, {"completion_tokens": attempt.tokens}
