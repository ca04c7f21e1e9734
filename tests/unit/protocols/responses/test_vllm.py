"""Streams and whole responses that vLLM 0.32 sent, for SmolLM2 with the parsers `hermes` and `deepseek_r1`.

A grammar (`structured_outputs`) fixed the model's output, so calls and thoughts are like those of a larger model. The files are named after
their cases in `CASES`.
"""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from lmaas.errors import EngineFailed
from lmaas.protocols.responses.answer import StreamedResponse
from tests.support.response_streams import check
from tests.unit.protocols.responses.build import TOOLS, VLLM, inference, streamed, whole

SDK: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ASKED: dict[str, Any] = {"tools": TOOLS, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
PARIS, ROME = '{"city": "Paris"}', '{"city": "Rome"}'
PATCH = '*** Begin Patch\n+café 🎉 "quoted" \\ end\n'
Shape = list[tuple[str, str]]
#: The items of a case: type and text, None for one that is only compared with the whole response.
CASES: dict[str, Shape | None] = {
    "text": [("message", "The capital of France is Paris.")],
    "cut": None,
    "logprobs": None,
    "emoji": [("message", 'Voilà 🎉👩‍👩‍👧 „ok“ \\ "x"\n\ttab')],
    "required": None,
    "named": None,
    "call": [("function_call", PARIS)],
    "text_and_call": [("message", "Let me look.\n"), ("function_call", PARIS)],
    "parallel": [("function_call", PARIS), ("function_call", ROME)],
    "custom": [("custom_tool_call", PATCH)],
    "custom_odd": [("custom_tool_call", '{"patch": "x"}')],
    "reasoning": [("reasoning", "The user asks about France."), ("message", "\n\nParis is the capital.")],
    "reasoning_call": [("reasoning", "I should look."), ("function_call", PARIS)],
    "reasoning_cut": [("reasoning", "The use")],
}


def shape(response: dict[str, Any]) -> Shape:
    found = []
    for item in response["output"]:
        text = "".join(part["text"] for part in item["content"]) if "content" in item else item.get("arguments", item.get("input"))
        found.append((item["type"], text))
    return found


def comparable(response: dict[str, Any]) -> dict[str, Any]:
    """Return the response without its times."""
    return response | {"created_at": 0, "completed_at": 0}


@pytest.mark.parametrize("name", CASES)
def test_a_stream_and_a_whole_answer_are_the_same_response(name: str) -> None:
    engine = (VLLM / f"{name}.sse").read_bytes()
    found, all_at_once = streamed(engine, range(0, len(engine), 100), **ASKED), whole((VLLM / f"{name}.json").read_bytes(), **ASKED)
    expected = CASES[name]
    assert expected is None or shape(found.response) == expected
    assert shape(found.response) == shape(all_at_once)
    for event in found.events:
        SDK.validate_python(event)
    Response.model_validate(all_at_once)
    # Only a stream shows which tokens belong to the text if there are other items.
    if len(found.response["output"]) == 1:
        assert comparable(found.response) == comparable(all_at_once)
    assert found.response["usage"] == all_at_once["usage"]


@pytest.mark.parametrize("name", CASES)
def test_the_client_library_reads_the_stream(name: str) -> None:
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=[], text_format=omit)
    for event in streamed((VLLM / f"{name}.sse").read_bytes(), **ASKED).events:
        state.handle_event(SDK.validate_python(event))


@given(st.sampled_from(list(CASES)), st.lists(st.integers(0, 25_000), max_size=40))
def test_any_pieces(name: str, cuts: list[int]) -> None:
    engine = (VLLM / f"{name}.sse").read_bytes()
    found, expected = streamed(engine, cuts, **ASKED), streamed(engine, **ASKED)
    assert comparable(found.response) == comparable(expected.response)


@given(st.sampled_from(list(CASES)), st.integers(0, 25_000))
def test_a_stream_that_is_cut_off(name: str, cut: int) -> None:
    """If the engine dies, the client's stream ends with a failure, whatever has come before."""
    engine = (VLLM / f"{name}.sse").read_bytes()
    answer = StreamedResponse(inference(stream=True, **ASKED))
    out = answer.feed(engine[: min(cut, len(engine) - 30)])
    check(out + answer.failed(EngineFailed("The engine failed.")))
