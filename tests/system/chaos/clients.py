"""Clients of many kinds: patient and impatient ones, and ones that stream, disconnect, send invalid requests and retry."""

import asyncio
import json
import random
from typing import Any

import aiohttp

from lmaas.keys import new_key
from tests.support.verdict import Attempt
from tests.system.chaos.service import Client, Service, now

#: The maximum duration of a request. Its deadline in the queue is 40 s.
HANG_S = 90.0
TRIES = 3
#: The statuses on which an OpenAI client retries.
RETRYABLE = (429, 500, 502, 503)
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
        self.current: Attempt | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Send requests until told to stop, then finish the running one."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            while not stop.is_set():
                (kind,) = self._random.choices(list(KINDS), list(KINDS.values()))
                body, key = self._request(kind)
                for _ in range(TRIES):
                    attempt = await self._attempt(session, kind, body, key)
                    if attempt.cut or not (attempt.broken or attempt.status in RETRYABLE) or stop.is_set():
                        break
                    await asyncio.sleep(self._random.uniform(0.1, 0.5))

    def _request(self, kind: str) -> tuple[dict[str, Any], str]:
        stream = kind in ("stream", "long stream", "cut mid-stream") or (kind == "cut while waiting" and self._random.random() < 0.5)
        body: dict[str, Any] = {
            "model": self._random.choice(self._client.models),
            "max_tokens": self._random.randint(*TOKENS.get(kind, (5, 80))),
            "ignore_eos": True,
            "stream": stream,
        }
        words = " ".join(["word"] * self._random.randint(3, 30))
        if self._random.random() < 0.5:
            body["messages"] = [{"role": "user", "content": words}]
        else:
            body["prompt"] = words
        if self._random.random() < SCHEMA_SHARE:
            number = self._random.randrange(SCHEMAS)
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"title": f"schema {number}"}}}
        if kind == "invalid":
            body["temperature"] = "hot"
        if kind == "unknown model":
            body["model"] = "nobodys-bot"
        if stream and self._random.random() < 0.5:
            body["stream_options"] = {"include_usage": True}
        return body, new_key() if kind == "unknown key" else self._client.key

    async def _attempt(self, session: aiohttp.ClientSession, kind: str, body: dict[str, Any], key: str) -> Attempt:
        gateway = self._random.choice(self._service.gateways)
        attempt = Attempt(kind, self._client.key_id, gateway, body["model"], body["stream"], now())
        self.attempts.append(attempt)
        self.current = attempt
        url = self._service.url(gateway) + ("/v1/chat/completions" if "messages" in body else "/v1/completions")
        cut_after_s = {"cut while waiting": self._random.uniform(0.005, 0.2), "cut plain": self._random.uniform(0.2, 1.0)}.get(kind)
        cut_after = self._random.randint(1, 40) if kind == "cut mid-stream" else None
        try:
            async with asyncio.timeout(cut_after_s or HANG_S):
                headers = {"authorization": f"Bearer {key}"}
                async with session.post(url, json=body, headers=headers) as response:
                    attempt.status, attempt.request_id = response.status, response.headers["x-request-id"]
                    if response.status == 200 and attempt.stream:
                        await self._read(response, attempt, cut_after)
                    else:
                        self._whole(await response.json(), attempt)
        except TimeoutError:
            attempt.cut, attempt.hung = cut_after_s is not None, cut_after_s is None
        except aiohttp.ClientConnectorError:
            attempt.broken = attempt.refused = True
        except (aiohttp.ClientError, ConnectionError):
            attempt.broken = True
        attempt.ended = now()
        self.current = None
        return attempt

    async def _read(self, response: aiohttp.ClientResponse, attempt: Attempt, cut_after: int | None) -> None:
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]\n":
                attempt.done = True
                return
            event = json.loads(line[6:])
            if "error" in event:
                attempt.code = event["error"]["code"]
                return
            for choice in event["choices"]:
                attempt.tokens += bool(choice.get("text") or choice.get("delta", {}).get("content"))
            attempt.usage = event.get("usage") or attempt.usage
            if attempt.tokens == cut_after:
                attempt.cut = True
                response.close()
                return
        # The stream ended without an error event.
        attempt.broken = True

    def _whole(self, answer: dict[str, Any], attempt: Attempt) -> None:
        if "error" in answer:
            attempt.code = answer["error"]["code"]
            return
        attempt.done, attempt.usage = True, answer["usage"]
        attempt.tokens = int(answer["usage"]["completion_tokens"])
