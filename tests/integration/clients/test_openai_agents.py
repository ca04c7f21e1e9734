"""OpenAI's Agents SDK with its default, which is the Responses API."""

from collections.abc import AsyncIterator
from typing import Any

import agents
import pytest
from agents import Agent, OpenAIConversationsSession, Runner, function_tool
from openai import AsyncOpenAI

from tests.integration.clients.conftest import Service
from tests.integration.clients.things import CALL, Trip, Weather

PATH = "/v1/responses"


@pytest.fixture(autouse=True)
async def _client(environment: Service) -> AsyncIterator[None]:
    # Traces would go to OpenAI. This is the documented way to turn them off.
    agents.set_tracing_disabled(True)
    # The framework would make the same client, but never close it.
    async with AsyncOpenAI() as client:
        agents.set_default_openai_client(client)
        yield


def agent(weather: Weather, **more: Any) -> Any:
    return Agent(name="Forecaster", instructions="Be brief.", model="base", tools=[function_tool(weather.__call__)], **more)


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_agent_with_a_tool(service: Service, streamed: bool) -> None:
    weather = Weather()
    if streamed:
        result: Any = Runner.run_streamed(agent(weather), CALL)
        kinds = {event.name async for event in result.stream_events() if event.type == "run_item_stream_event"}
        assert kinds == {"tool_called", "tool_output", "message_output_created"}
    else:
        result = await Runner.run(agent(weather), CALL)
    assert result.final_output
    assert weather.asked == [("x", 1)]
    assert len(service.exchanges(PATH)) == 2
    again = await Runner.run(agent(weather), [*result.to_input_list(), {"role": "user", "content": CALL}])
    assert again.final_output
    assert len(weather.asked) == 2


async def test_a_structured_output(service: Service) -> None:
    result = await Runner.run(Agent(name="Planner", model="base", output_type=Trip), "Plan a trip.")
    assert isinstance(result.final_output, Trip)


async def test_turns_that_the_service_remembers(service: Service) -> None:
    weather = Weather()
    first = await Runner.run(agent(weather), CALL, auto_previous_response_id=True)
    second = await Runner.run(agent(weather), "And now?", previous_response_id=first.last_response_id)
    assert second.final_output
    assert [len(exchange.body["input"]) for exchange in service.exchanges(PATH)][1:] == [1, 1]


async def test_a_handoff(service: Service) -> None:
    weather = Weather()
    desk = Agent(name="Desk", model="base", handoffs=[agent(weather)])
    result = await Runner.run(desk, f"{CALL} It is transfer_to_forecaster.")
    assert result.last_agent.name == "Forecaster"
    assert result.final_output


async def test_a_session_in_a_conversation(service: Service) -> None:
    weather, session = Weather(), OpenAIConversationsSession()
    await Runner.run(agent(weather), CALL, session=session)
    second = await Runner.run(agent(weather), "And now?", session=session)
    assert second.final_output
    assert [item["type"] for item in await session.get_items()] == ["message", "function_call", "function_call_output"] + ["message"] * 3
    assert (await session.pop_item())["role"] == "assistant"
    await session.clear_session()
