"""Pydantic AI, with its model classes for OpenAI's chat and responses and for Anthropic's messages."""

from collections.abc import AsyncIterator

import pytest
from pydantic_ai import Agent, Embedder, NativeOutput
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel, OpenAIResponsesModelSettings
from pydantic_ai.providers.openai import OpenAIProvider

from tests.integration.clients.conftest import Service
from tests.integration.clients.things import CALL, Trip, Weather

MODELS = {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel, "messages": AnthropicModel}


@pytest.fixture(params=MODELS)
async def model(environment: Service, request: pytest.FixtureRequest) -> AsyncIterator[Model]:
    async with MODELS[request.param]("base") as model:
        yield model


async def test_models_by_name(environment: Service) -> None:
    for prefix, path in (("openai", "/v1/responses"), ("openai-responses", "/v1/responses"), ("anthropic", "/v1/messages")):
        async with Agent(f"{prefix}:base") as agent:
            assert (await agent.run("Hello.")).output
        assert len(environment.exchanges(path)) > 0


async def test_an_answer_and_a_stream(model: Model) -> None:
    agent = Agent(model, instructions="Be brief.")
    answer = await agent.run("Hello.")
    assert answer.usage.output_tokens == len(answer.output.split())
    async with agent.run_stream("Hello.") as stream:
        pieces = [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]
    assert "".join(pieces) == answer.output


async def test_a_tool_and_a_structured_output(model: Model) -> None:
    weather = Weather()
    agent = Agent(model, output_type=Trip)
    agent.tool_plain(name="weather")(weather.__call__)
    answer = await agent.run(CALL)
    assert answer.output.first.days == 1
    assert weather.asked == [("x", 1)]
    again = await agent.run(CALL, message_history=answer.all_messages())
    assert again.output == answer.output
    async with agent.run_stream(CALL) as stream:
        assert await stream.get_output() == answer.output
    assert len(weather.asked) == 3


@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
async def test_the_models_own_structured_output(environment: Service, kind: type[OpenAIChatModel] | type[OpenAIResponsesModel]) -> None:
    async with kind("base") as model:
        answer = await Agent(model, output_type=NativeOutput(Trip)).run("Plan a trip.")
        assert answer.output.first.days == 1


async def test_turns_that_the_service_remembers(environment: Service) -> None:
    settings = OpenAIResponsesModelSettings(openai_previous_response_id="auto")
    async with OpenAIResponsesModel("base", settings=settings) as model:
        agent = Agent(model)
        first = await agent.run("Hello.")
        assert (await agent.run("And now?", message_history=first.all_messages())).output
    assert [len(exchange.body["input"]) for exchange in environment.exchanges("/v1/responses")] == [1, 1]


async def test_embeddings(environment: Service) -> None:
    async with OpenAIProvider() as provider:
        embedder = Embedder(OpenAIEmbeddingModel("embedder", provider=provider))
        documents = await embedder.embed_documents(["one two", "three"])
        query = await embedder.embed_query("three")
    assert query.embeddings[0] == pytest.approx(documents.embeddings[1], abs=1e-6)
    assert documents.usage.input_tokens > 0
