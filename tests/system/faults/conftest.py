"""A running service of real processes, and requests to it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from lmaas.keys import new_key
from lmaas.store.scopes import OPERATOR
from lmaas.store.usage import UsageEvent, list_events
from tests.integration.gateway.stack import Stream
from tests.support.conditions import until
from tests.system.chaos.service import MODEL, Client, Service, running

#: The time in which the service recovers from a loss of Redis or Postgres.
RECOVERY_S = 5.0


@dataclass
class Caller:
    """A tenant of a service, and its requests."""

    service: Service
    client: Client

    def http(self, gateway: str, key: str | None = None) -> httpx.AsyncClient:
        """Return an HTTP client of one gateway."""
        headers = {"authorization": f"Bearer {self.client.key if key is None else key}"}
        return httpx.AsyncClient(base_url=self.service.url(gateway), headers=headers, timeout=60)

    async def ask(
        self, gateway: str = "gateway-0", *, tokens: int = 3, model: str = MODEL, key: str | None = None, **more: Any
    ) -> httpx.Response:
        """Send a plain completion."""
        async with self.http(gateway, key) as http:
            body = {"model": model, "prompt": "One two", "max_tokens": tokens, "ignore_eos": True} | more
            return await http.post("/v1/completions", json=body)

    async def works(self, gateway: str = "gateway-0", model: str = MODEL) -> bool:
        """Return whether a request succeeds now."""
        with contextlib.suppress(httpx.TransportError):
            return (await self.ask(gateway, model=model)).status_code == 200
        return False

    async def stranger(self, gateway: str) -> tuple[int, str]:
        """Return the status and the error code for a key that does not exist."""
        response = await self.ask(gateway, key=new_key())
        return response.status_code, response.json()["error"]["code"]

    def stream(self, into: Stream, gateway: str = "gateway-0", *, tokens: int, model: str = MODEL) -> "asyncio.Task[None]":
        """Begin to read a stream."""
        return asyncio.create_task(self._stream(into, gateway, tokens, model))

    async def _stream(self, got: Stream, gateway: str, tokens: int, model: str) -> None:
        body = {"model": model, "prompt": "One two", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        async with self.http(gateway) as http, http.stream("POST", "/v1/completions", json=body) as response:
            got.status, got.headers = response.status_code, dict(response.headers)
            async for line in response.aiter_lines():
                if line.startswith(":"):
                    got.comments.append(line)
                elif line:
                    got.raw.append(line.removeprefix("data: "))

    async def ledger(self, *ids: str) -> dict[str, UsageEvent]:
        """Return the ledger's lines of these requests, once all of them exist."""
        found: dict[str, UsageEvent] = {}

        async def there() -> bool:
            found.update({event.request_id: event for event in await list_events(self.service.db, OPERATOR) if event.request_id in ids})
            return len(found) == len(ids)

        await until(there)
        return found

    async def rests(self) -> None:
        """Wait until nothing is queued and no slot is taken."""

        async def nothing_left() -> bool:
            stats = await self.service.scheduler.stats(self.service.model.id)
            return bool(stats["queued"] == 0 and stats["load"] == 0)

        await until(nothing_left)


@pytest.fixture(scope="module")
async def caller() -> AsyncIterator[Caller]:
    """A tenant with one adapter on a service with two gateways, each of which knows it."""
    async with running() as service:
        (client,) = await service.clients("acme", 1, adapters=1, max_queued=256)
        caller = Caller(service, client)
        for gateway in service.gateways:
            for model in client.models:
                await until(lambda gateway=gateway, model=model: caller.works(gateway, model))
        yield caller
        assert service.ended() == {}, "a fault ended a process that it did not concern"


def completed(got: Stream, tokens: int) -> bool:
    """Return whether a stream succeeded with this many tokens."""
    return got.done and got.error is None and got.tokens == tokens
