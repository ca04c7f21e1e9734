"""Owners of durable work: they upload files, create batches and background responses, and collect the results, whatever process dies
meanwhile."""

import asyncio
import json
import random
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.support.conditions import until
from tests.support.durable_verdict import ENDED, BatchEnd
from tests.system.chaos.dialects import EMBEDDINGS, TEXT, Dialect
from tests.system.chaos.service import EMBEDDER, Client, Service

FILES, BATCHES, RESPONSES = "/v1/files", "/v1/batches", "/v1/responses"
#: The endpoints of batches, and the protocol of each.
DIALECTS = {dialect.path: dialect for dialect in (*TEXT, EMBEDDINGS) if dialect.path != "/v1/messages"}
#: The share of lines that cannot succeed: their model is unknown, or their body is wrong.
FAILING_SHARE = 0.05
#: The longest time in which a request may be repeated until it succeeds. Faults last for some seconds each.
RETRY_S = 90.0
#: The states of a response that has not ended.
UNFINISHED = ("queued", "in_progress")


@dataclass(slots=True)
class Sent:
    """A batch that was created, with the custom ids of its input."""

    file: str
    lines: list[str] = field(default_factory=list)
    failing: set[str] = field(default_factory=set)


class Owner:
    """The owner of durable work of one tenant, with a key that nothing else uses."""

    def __init__(self, service: Service, client: Client, seed: str) -> None:
        self._service, self._client = service, client
        self._random = random.Random(seed)
        #: The batches that were sent, by the name of the file.
        self.sent: dict[str, Sent] = {}
        #: The ids of batches and responses whose cancellation was requested.
        self.cancelled: set[str] = set()
        self.responses: list[str] = []

    @property
    def key_id(self) -> str:
        """The id of the owner's key."""
        return self._client.key_id

    async def create_batch(self, endpoint: str, count: int, *, tokens: tuple[int, int]) -> str:
        """Upload a file of `count` lines and create its batch. Returns the batch's id."""
        name = f"{self._client.tenant}-{len(self.sent)}.jsonl"
        sent = self.sent[name] = Sent(name)
        body = b"".join(self._line(sent, DIALECTS[endpoint], number, tokens) for number in range(count))

        def form() -> aiohttp.FormData:
            data = aiohttp.FormData()
            data.add_field("purpose", "batch")
            data.add_field("file", body, filename=name, content_type="application/jsonl")
            return data

        uploaded = await self._ask("POST", FILES, form=form)
        asked = {"input_file_id": uploaded["id"], "endpoint": endpoint, "completion_window": "24h", "metadata": {"file": name}}
        return str((await self._ask("POST", BATCHES, body=asked, once=name))["id"])

    def _line(self, sent: Sent, dialect: Dialect, number: int, tokens: tuple[int, int]) -> bytes:
        custom_id = f"{sent.file}/{number}"
        body = dialect.body(" ".join(["word"] * self._random.randint(3, 30)), self._random.randint(*tokens), stream=False)
        body["model"] = EMBEDDER if dialect is EMBEDDINGS else self._random.choice(self._client.models)
        if self._random.random() < FAILING_SHARE:
            body |= self._random.choice([{"model": "nobodys-bot"}, {"model": 5}, {"temperature": "hot", "dimensions": -1}])
            sent.failing.add(custom_id)
        sent.lines.append(custom_id)
        return json.dumps({"custom_id": custom_id, "method": "POST", "url": dialect.path, "body": body}).encode() + b"\n"

    async def create_response(self, tokens: int) -> str:
        """Create a background response. Returns its id."""
        number = len(self.responses)
        body = DIALECTS[RESPONSES].body(f"word number {number}", tokens, stream=False)
        body |= {"model": self._random.choice(self._client.models), "background": True}
        response = await self._ask("POST", RESPONSES, body=body, once=f"response-{number}")
        self.responses.append(response["id"])
        return str(response["id"])

    async def cancel(self, path: str, identifier: str) -> None:
        """Cancel a batch or a response, which may have ended."""
        self.cancelled.add(identifier)
        await self._ask("POST", f"{path}/{identifier}/cancel", body={}, accepted=(200, 400, 409))

    async def progress(self) -> int:
        """Return the number of lines of batches that have a result."""
        counts = [batch["request_counts"] for batch in await self.batches()]
        return sum(each["completed"] + each["failed"] for each in counts)

    async def batches(self) -> list[dict[str, Any]]:
        """Return all batches."""
        return list((await self._ask("GET", f"{BATCHES}?limit=100"))["data"])

    async def batch_ends(self) -> list[BatchEnd]:
        """Return all batches with the lines of their files."""
        found = []
        for batch in await self.batches():
            sent = self.sent[batch["metadata"]["file"]]
            files = [await self._lines(batch[name]) for name in ("output_file_id", "error_file_id")]
            found.append(BatchEnd(batch, tuple(sent.lines), frozenset(sent.failing), *files))
        return found

    async def has_ended(self, response: str) -> bool:
        """Return whether a background response has ended."""
        return (await self._ask("GET", f"{RESPONSES}/{response}"))["status"] not in UNFINISHED

    async def response_ends(self) -> list[dict[str, Any]]:
        """Return all background responses."""
        return [await self._ask("GET", f"{RESPONSES}/{identifier}") for identifier in self.responses]

    async def ended(self) -> bool:
        """Return whether all work has ended."""
        if any(batch["status"] not in ENDED for batch in await self.batches()):
            return False
        return all(response["status"] not in UNFINISHED for response in await self.response_ends())

    async def _lines(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        text = await self._ask("GET", f"{FILES}/{file_id}/content", raw=True)
        return [json.loads(line) for line in text.decode().splitlines()]

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        form: Any = None,
        once: str | None = None,
        accepted: tuple[int, ...] = (200,),
        raw: bool = False,
    ) -> Any:
        """Send a request until it succeeds, as a patient client does. `once` is an idempotency key."""
        found: list[Any] = []
        headers = {"authorization": f"Bearer {self._client.key}"} | ({"idempotency-key": once} if once else {})

        async def succeeded() -> bool:
            gateway = self._random.choice(self._service.gateways)
            try:
                async with (
                    aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True), timeout=aiohttp.ClientTimeout(30)) as session,
                    session.request(
                        method, self._service.url(gateway) + path, json=body, data=form() if form else None, headers=headers
                    ) as response,
                ):
                    content = await response.read()
                    if response.status in accepted:
                        found.append(content if raw else json.loads(content))
                    else:
                        assert response.status >= 500 or response.status in (409, 429), (method, path, response.status, content[:500])
            except (aiohttp.ClientError, ConnectionError, TimeoutError, asyncio.IncompleteReadError):
                pass  # the gateway was killed, or has not started yet
            return bool(found)

        await until(succeeded, timeout_s=RETRY_S, every_s=0.3)
        return found[0]
