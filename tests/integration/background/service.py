"""The service and the client helpers that the tests of responses in the background share."""

from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI

from lmaas.store.models import BaseModel
from tests.integration.gateway.stack import Replica, Stack, Tenant
from tests.support.conditions import until

RESPONSES = "/v1/responses"
ENDS = {"completed", "incomplete", "failed", "cancelled"}


@dataclass(frozen=True)
class Service:
    stack: Stack
    model: BaseModel
    replica: Replica

    def client(self, tenant: Tenant, url: str = "") -> AsyncOpenAI:
        """Return OpenAI's client, which compares responses with the OpenAPI document."""
        http = self.stack.client(tenant, url)
        return AsyncOpenAI(base_url=f"{url or self.stack.url}/v1", api_key=tenant.key, max_retries=0, http_client=http)


async def create(client: AsyncOpenAI, words: str = "Say hi.", **more: Any) -> Any:
    more.setdefault("max_output_tokens", 8)
    return await client.responses.create(model="base", input=words, background=True, **more)


async def ended(client: AsyncOpenAI, response_id: str, timeout_s: float = 20) -> Any:
    """Poll as OpenAI's guide recommends, until the response has ended."""
    found: list[Any] = []

    async def is_over() -> bool:
        found.append(await client.responses.retrieve(response_id))
        return found[-1].status in ENDS

    await until(is_over, timeout_s=timeout_s)
    return found[-1]


async def log_of(service: Service, tenant: Tenant, response_id: str, after: int | None = None) -> bytes:
    """Stream a response from its log to its end."""
    query: dict[str, Any] = {"stream": "true"} | ({} if after is None else {"starting_after": after})
    async with service.stack.client(tenant) as http:
        answer = await http.get(f"{RESPONSES}/{response_id}", params=query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return answer.content
