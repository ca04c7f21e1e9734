"""Batches and background responses with the real engine, through OpenAI's client."""

import json
from typing import Any

from openai import OpenAI
from openai.types import Batch

from tests.system.e2e.conftest import EMBEDDING_MODEL, MODEL, START_S, Stack, wait_for

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def _create(client: OpenAI, endpoint: Any, bodies: dict[str, dict[str, Any]]) -> Batch:
    lines = [{"custom_id": name, "method": "POST", "url": endpoint, "body": body} for name, body in bodies.items()]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("lines.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")


def _answers(client: OpenAI, batch: Batch) -> dict[str, Any]:
    """Return the bodies of a batch's responses once it has ended."""
    found = wait_for(lambda: _ended(client, batch), START_S, "the batch has ended")
    assert found.status == "completed"
    assert found.error_file_id is None, client.files.content(found.error_file_id).text
    lines = [json.loads(line) for line in client.files.content(found.output_file_id).text.splitlines()]
    return {line["custom_id"]: line["response"]["body"] for line in lines}


def _ended(client: OpenAI, batch: Batch) -> Batch | None:
    found = client.batches.retrieve(batch.id)
    return found if found.status in ("completed", "failed", "expired", "cancelled") else None


def test_a_batch_answers_as_requests_do(stack: Stack) -> None:
    """The lines of a batch over a base model and an adapter, embeddings, and a background response give the same results as requests."""
    stack.warm()
    chat: Any = {"messages": QUESTION, "temperature": 0, "max_tokens": 20}
    with stack.openai("acme") as acme, stack.openai("globex") as globex:
        acme.embeddings.create(model=EMBEDDING_MODEL, input="Hi")
        chats = _create(acme, "/v1/chat/completions", {model: {"model": model} | chat for model in (MODEL, "json-bot")})
        others = _create(globex, "/v1/chat/completions", {"pirate-bot": {"model": "pirate-bot"} | chat})
        vectors = _create(acme, "/v1/embeddings", {text: {"model": EMBEDDING_MODEL, "input": text} for text in ("One", "Two", "Three")})
        background = acme.responses.create(model="json-bot", input="What is the capital of France?", max_output_tokens=60, background=True)
        assert background.status in ("queued", "in_progress")

        answers = _answers(acme, chats) | _answers(globex, others)
        for model, client in ((MODEL, acme), ("json-bot", acme), ("pirate-bot", globex)):
            asked = client.chat.completions.create(model=model, **chat)
            assert answers[model]["choices"][0]["message"]["content"] == asked.choices[0].message.content
            assert answers[model]["usage"]["completion_tokens"] == asked.usage.completion_tokens
        assert all(len(answer["data"][0]["embedding"]) == 384 for answer in _answers(acme, vectors).values())

        def finished() -> Any:
            response = acme.responses.retrieve(background.id)
            return response if response.status not in ("queued", "in_progress") else None

        response = wait_for(finished, START_S, "the response has ended")
        assert response.status == "completed"
        assert "Paris" in response.output_text
