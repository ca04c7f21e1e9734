"""Batches from end to end: both clients, a job runner and a fake engine."""

from typing import Any

import pytest
from anthropic import AsyncAnthropic
from openai.types import Batch

from lmaas.store.usage import list_events
from tests.integration.batches.conftest import Account, jsonl, line
from tests.integration.gateway.stack import Stack
from tests.support.conditions import until


async def end_of(account: Account, batch: Batch) -> Batch:
    found = [batch]

    async def ended() -> bool:
        found[0] = await account.show(batch)
        return found[0].status in ("completed", "failed", "expired", "cancelled")

    await until(ended, every_s=0.1)
    return found[0]


@pytest.mark.usefixtures("runner")
async def test_every_endpoint(account: Account, stack: Stack) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"max_tokens": 4},
        "/v1/completions": {"messages": None, "prompt": "Hello", "max_tokens": 4},
        "/v1/responses": {"messages": None, "input": "Hello", "max_output_tokens": 4, "store": False},
        "/v1/embeddings": {"model": "embedder", "messages": None, "input": ["Hello", "you"]},
    }
    batches = {
        endpoint: await account.create(jsonl(line(f"{number}", endpoint, **body) for number in range(3)), endpoint)
        for endpoint, body in bodies.items()
    }
    for endpoint, created in batches.items():
        batch = await end_of(account, created)
        assert (batch.status, batch.error_file_id) == ("completed", None), endpoint
        output = await account.lines(batch.output_file_id)
        assert {each["custom_id"] for each in output} == {"0", "1", "2"}
        objects = {each["response"]["body"]["object"] for each in output}
        assert objects == {
            {"/v1/chat/completions": "chat.completion", "/v1/completions": "text_completion", "/v1/responses": "response"}.get(
                endpoint, "list"
            )
        }
        assert batch.usage is not None
        assert batch.usage.total_tokens > 0
        ids = {each["response"]["request_id"] for each in output}
        events = [event for event in await list_events(stack.db, account.tenant.id) if event.request_id in ids]
        assert {event.status for event in events} == {"completed"}
        assert len(events) == 3
        assert sum(event.prompt_tokens + event.completion_tokens for event in events) == batch.usage.total_tokens


@pytest.mark.usefixtures("runner")
async def test_a_message_batch(account: Account) -> None:
    async with AsyncAnthropic(base_url=account.stack.url, api_key=account.tenant.key, max_retries=0) as client:
        params: Any = {"model": "base", "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
        wrong = params | {"temperature": 7}
        batch = await client.messages.batches.create(requests=[{"custom_id": "a", "params": params}, {"custom_id": "b", "params": wrong}])

        async def ended() -> bool:
            return bool((await client.messages.batches.retrieve(batch.id)).processing_status == "ended")

        await until(ended, every_s=0.1)
        results = {each.custom_id: each.result async for each in await client.messages.batches.results(batch.id)}
        assert results["a"].type == "succeeded"
        assert results["a"].message.usage.output_tokens == 4
        assert results["b"].type == "errored"
        assert results["b"].error.error.message.startswith("temperature")
