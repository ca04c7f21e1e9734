"""LangChain, with its packages for OpenAI and for Anthropic."""

from typing import Any

import pytest
import tiktoken
from langchain_anthropic import ChatAnthropic
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai import DefaultAsyncHttpxClient

from tests.integration.clients.conftest import Service
from tests.integration.clients.things import CALL, Trip, Weather

weather = tool("weather", Weather().__call__)


def _chat() -> BaseChatModel:
    return ChatOpenAI(model="base")


def _responses() -> BaseChatModel:
    return ChatOpenAI(model="base", use_responses_api=True)


def _messages() -> BaseChatModel:
    return ChatAnthropic(model="base")


MODELS = {"chat": _chat, "responses": _responses, "messages": _messages}


@pytest.fixture(params=MODELS)
def model(environment: Service, request: pytest.FixtureRequest) -> BaseChatModel:
    return MODELS[request.param]()


async def test_an_answer_and_a_stream(model: BaseChatModel) -> None:
    answer = await model.ainvoke("Hello.")
    assert answer.text
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == len(answer.text.split())
    pieces = [piece async for piece in model.astream("Hello.")]
    whole: Any = sum(pieces[1:], pieces[0])
    assert whole.text == answer.text


async def test_a_conversation_with_a_tool(model: BaseChatModel) -> None:
    able = model.bind_tools([weather])
    messages: list[Any] = [HumanMessage(CALL)]
    for streamed in (False, True):
        if streamed:
            pieces = [piece async for piece in able.astream(messages)]
            asked: Any = sum(pieces[1:], pieces[0])
        else:
            asked = await able.ainvoke(messages)
        (call,) = asked.tool_calls
        result = await weather.ainvoke(call)
        assert isinstance(result, ToolMessage)
        messages += [asked, result]
        final = await able.ainvoke(messages)
        assert final.text
        assert not getattr(final, "tool_calls", None)
        messages += [final, HumanMessage(CALL)]


async def test_structured_output(model: BaseChatModel) -> None:
    trip = await model.with_structured_output(Trip).ainvoke("Plan a trip.")
    assert isinstance(trip, Trip)
    assert trip.first.days == 1


@pytest.mark.parametrize("by_tokens", [True, False])
async def test_embeddings(environment: Service, monkeypatch: pytest.MonkeyPatch, by_tokens: bool) -> None:
    # By default the library sends token ids and would download this vocabulary, of which the test needs only the bytes.
    ranks = {bytes([each]): each for each in range(256)}
    small = tiktoken.Encoding("cl100k_base", pat_str=r"(?s).", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "cl100k_base", small)
    more: dict[str, Any] = {} if by_tokens else {"check_embedding_ctx_length": False}
    # The library never closes a client of its own.
    async with DefaultAsyncHttpxClient() as http:
        embeddings = OpenAIEmbeddings(model="embedder", http_async_client=http, **more)
        vectors = await embeddings.aembed_documents(["one two", "three"])
        assert vectors[1] == pytest.approx(await embeddings.aembed_query("three"), abs=1e-6)
    assert vectors[0] != vectors[1]
    exchange = environment.exchanges("/v1/embeddings")[0]
    assert isinstance(exchange.body["input"][1], list if by_tokens else str)
