"""The events of streams, from the engine's chunks."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import _models
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from lmaas.errors import EngineFailed, InternalError, InvalidRequest, LmaasError, OverLimit, OverQuota
from lmaas.protocols.responses.answer import StreamedResponse
from tests.support.response_streams import check, parse
from tests.unit.protocols.responses.build import (
    HEX,
    TOOLS,
    calling,
    chunk,
    ending,
    event,
    fed,
    inference,
    stream,
    streamed,
    words,
)

SDK: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ADDED, DONE = "response.output_item.added", "response.output_item.done"
PART, PART_DONE = "response.content_part.added", "response.content_part.done"
BEGINNING = ["response.created", "response.in_progress"]


def items(response: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the type, the status and the text of each item."""
    found = []
    for item in response["output"]:
        parts = item.get("content")
        text = "".join(part["text"] for part in parts) if parts is not None else item.get("arguments", item.get("input"))
        found.append((item["type"], item["status"], text))
    return found


def test_text_token_by_token() -> None:
    engine = stream(*words("Par", "is", ' é🎉\n"\\'), prompt_tokens_details={"cached_tokens": 3, "created_cache_tokens": 2})
    places = [place for place in range(len(engine)) if engine.startswith(b"data: ", place)]
    found = streamed(engine, places)
    delta, done = "response.output_text.delta", "response.output_text.done"
    assert found.kinds == [*BEGINNING, ADDED, PART, delta, delta, delta, done, PART_DONE, DONE, "response.completed"]
    assert found.pieces(delta) == ["Par", "is", ' é🎉\n"\\']
    response = found.response
    assert response["id"] == f"resp_{HEX}"
    assert response["output"] == [
        {
            "id": f"msg_{HEX}0000",
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "annotations": [], "logprobs": [], "text": 'Paris é🎉\n"\\'}],
        }
    ]
    assert response["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 2},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 10,
    }


def test_pieces_that_arrive_together_are_one_event() -> None:
    found = streamed(stream(*words("a", "b", "c"), calling(0, "weather", "{"), calling(0, None, "}")), tools=TOOLS)
    assert found.pieces("response.output_text.delta") == ["abc"]
    assert found.pieces("response.function_call_arguments.delta") == ["{}"]


CASES: dict[str, tuple[bytes, dict[str, Any], list[tuple[str, str, str]]]] = {
    "text": (stream(*words("a", "b")), {}, [("message", "completed", "ab")]),
    "nothing": (stream(*words("")), {}, [("message", "completed", "")]),
    "nothing said": (stream({}), {}, [("message", "completed", "")]),
    "white space": (stream(*words("\n", " ")), {}, [("message", "completed", "\n ")]),
    "leading white space": (stream(*words("\n", " a")), {}, [("message", "completed", "\n a")]),
    "cut": (stream(*words("a", "b"), finish="length"), {}, [("message", "incomplete", "ab")]),
    "filtered": (stream(*words("a"), finish="content_filter"), {}, [("message", "incomplete", "a")]),
    "a call": (
        stream(calling(0, "weather"), calling(0, None, '{"a"'), calling(0, None, ":1}")),
        {},
        [("function_call", "completed", '{"a":1}')],
    ),
    "a call in one piece": (stream(calling(0, "weather", "{}"), finish="tool_calls"), {}, [("function_call", "completed", "{}")]),
    "a call without arguments": (stream(calling(0, "weather")), {}, [("function_call", "completed", "{}")]),
    "a call with blank arguments": (stream(calling(0, "weather", " \n")), {}, [("function_call", "completed", " \n{}")]),
    "two calls without arguments": (
        stream(calling(0, "weather"), calling(1, "other")),
        {},
        [("function_call", "completed", "{}"), ("function_call", "completed", "{}")],
    ),
    "a call that is cut before its arguments": (
        stream(calling(0, "weather"), finish="length"),
        {},
        [("function_call", "incomplete", "")],
    ),
    "a call that is cut": (stream(calling(0, "weather", '{"a'), finish="length"), {}, [("function_call", "incomplete", '{"a')]),
    "text, then calls": (
        stream(*words("\n", "Well. ", "\n"), calling(0, "weather", "{}"), *words("\n"), calling(1, "weather", "[]"), *words("\n")),
        {},
        [("message", "completed", "\nWell. \n"), ("function_call", "completed", "{}"), ("function_call", "completed", "[]")],
    ),
    "two calls in a chunk": (
        stream({"tool_calls": [*calling(0, "weather", "{}")["tool_calls"], *calling(1, "other", "[]")["tool_calls"]]}),
        {},
        [("function_call", "completed", "{}"), ("function_call", "completed", "[]")],
    ),
    "text after a call": (
        stream(calling(0, "weather", "{}"), *words("\n", "Done.")),
        {},
        [("function_call", "completed", "{}"), ("message", "completed", "\nDone.")],
    ),
    "text and reasoning within a call": (
        stream(calling(0, "weather"), *words("\n", "Hm."), {"reasoning": "I"}, calling(0, None, "{}"), calling(1, "other", "[]")),
        {},
        [
            ("function_call", "completed", "{}"),
            ("reasoning", "completed", "I"),
            ("message", "completed", "\nHm."),
            ("function_call", "completed", "[]"),
        ],
    ),
    "white space within a call that is cut": (
        stream(calling(0, "weather"), *words("\n"), calling(0, None, "{"), finish="length"),
        {},
        [("function_call", "incomplete", "{")],
    ),
    "text after a call that is cut": (
        stream(calling(0, "weather", "{}"), *words("Do"), finish="length"),
        {},
        [("function_call", "completed", "{}"), ("message", "incomplete", "Do")],
    ),
    "reasoning within a custom call": (
        stream(calling(0, "apply_patch", '{"input": "a'), {"reasoning": "I"}, calling(0, None, 'b"}')),
        {},
        [("custom_tool_call", "completed", "ab"), ("reasoning", "completed", "I")],
    ),
    "reasoning": (
        stream({"reasoning": "I "}, {"reasoning": "think"}, *words("\n\n", "So.")),
        {},
        [("reasoning", "completed", "I think"), ("message", "completed", "\n\nSo.")],
    ),
    "reasoning and text in a chunk": (
        stream({"reasoning": "I", "content": "So"}),
        {},
        [("reasoning", "completed", "I"), ("message", "completed", "So")],
    ),
    "only reasoning": (stream({"reasoning": "I"}, *words("\n"), finish="length"), {}, [("reasoning", "incomplete", "I")]),
    "reasoning that is cut": (stream({"reasoning": "I"}, finish="length"), {}, [("reasoning", "incomplete", "I")]),
    "reasoning and a call": (
        stream({"reasoning": "I"}, *words("\n"), calling(0, "weather", "{}")),
        {},
        [("reasoning", "completed", "I"), ("function_call", "completed", "{}")],
    ),
    "a custom tool": (
        stream(calling(0, "apply_patch"), calling(0, None, '{"input": "*** '), calling(0, None, 'Begin\\n"}')),
        {},
        [("custom_tool_call", "completed", "*** Begin\n")],
    ),
    "a custom tool with other arguments": (
        stream(calling(0, "apply_patch", '{"patch": "x"}')),
        {},
        [("custom_tool_call", "completed", '{"patch": "x"}')],
    ),
    "a custom tool that is cut": (
        stream(calling(0, "apply_patch", '{"input": "a'), finish="length"),
        {},
        [("custom_tool_call", "incomplete", "a")],
    ),
    "a custom tool without input": (stream(calling(0, "apply_patch")), {}, [("custom_tool_call", "completed", "")]),
    "both kinds of tools": (
        stream(calling(0, "apply_patch", '{"input": "a"}'), calling(1, "weather", "{}"), calling(2, "apply_patch", '{"input":"b"}')),
        {},
        [("custom_tool_call", "completed", "a"), ("function_call", "completed", "{}"), ("custom_tool_call", "completed", "b")],
    ),
}


@pytest.mark.parametrize(("engine", "body", "expected"), CASES.values(), ids=CASES)
def test_items(engine: bytes, body: dict[str, Any], expected: list[tuple[str, str, str]]) -> None:
    found = streamed(engine, tools=TOOLS, **body)
    assert items(found.response) == expected
    is_cut = expected[-1][1] == "incomplete" or b'"finish_reason":"length"' in engine
    assert found.kinds[-1] == ("response.incomplete" if is_cut else "response.completed")
    for each in found.events:
        SDK.validate_python(each)
        assert _models.validate_type(type_=ResponseStreamEvent, value=each).to_dict() == each


@given(st.sampled_from(list(CASES)), st.lists(st.integers(0, 4000), max_size=30))
def test_the_same_response_however_the_bytes_arrive(name: str, cuts: list[int]) -> None:
    engine, body, expected = CASES[name]
    found = streamed(engine, cuts, tools=TOOLS, **body)
    assert items(found.response) == expected


def test_byte_by_byte() -> None:
    for engine, body, expected in CASES.values():
        assert items(streamed(engine, range(len(engine)), tools=TOOLS, **body).response) == expected


def test_names_and_ids_of_calls() -> None:
    found = streamed(stream(*words("a"), calling(0, 'we"ather', "{}"), calling(1, "apply_patch", '{"input":"x"}')), tools=TOOLS)
    _, call, custom = found.response["output"]
    assert (call["id"], call["call_id"], call["name"]) == (f"fc_{HEX}0001", f"call_{HEX}0001", 'we"ather')
    assert (custom["id"], custom["call_id"], custom["name"]) == (f"ctc_{HEX}0002", f"call_{HEX}0002", "apply_patch")


@pytest.mark.parametrize(("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")])
def test_why_an_answer_is_incomplete(finish: str, reason: str) -> None:
    assert streamed(stream(*words("a"), finish=finish)).response["incomplete_details"] == {"reason": reason}


def test_log_probabilities() -> None:
    def of(text: str, **more: Any) -> dict[str, Any]:
        return {"content": [{"token": text, "logprob": -0.5, "bytes": list(text.encode()), "top_logprobs": []} | more]}

    top = {"token": "o", "logprob": -1.5, "bytes": None}
    engine = b"".join(
        [
            chunk({"role": "assistant", "content": ""}, 0),
            chunk({"reasoning": "r"}, 1, logprobs=of("r")),
            chunk({"content": "\n"}, 2, logprobs=of("\n")),
            chunk({"content": "a"}, 3, logprobs=of("a", top_logprobs=[top], bytes=None)),
            chunk({"content": ""}, 4, logprobs=of("half")),
            chunk(calling(0, "weather", "{}"), 5, "stop", logprobs=of("c")),
            ending(5),
        ]
    )
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 1, "tools": TOOLS}
    for cuts in ((), range(len(engine))):
        found = streamed(engine, cuts, **asked)
        part = found.response["output"][1]["content"][0]
        assert [token["token"] for token in part["logprobs"]] == ["\n", "a", "half"]
        assert part["logprobs"][1] == {"token": "a", "logprob": -0.5, "bytes": [], "top_logprobs": [top | {"bytes": []}]}
        for each in found.events:
            SDK.validate_python(each)
    assert streamed(engine, tools=TOOLS).response["output"][1]["content"][0]["logprobs"] == []


ERRORS: list[tuple[LmaasError, str, str | None]] = [
    (EngineFailed("lost"), "server_error", None),
    (InternalError(), "server_error", None),
    (InvalidRequest("too long", code="context_length_exceeded", param="input"), "context_length_exceeded", "input"),
    (InvalidRequest("wrong", param="tools"), "invalid_prompt", "tools"),
    (OverLimit("wait"), "rate_limit_exceeded", None),
    (OverQuota("no more"), "insufficient_quota", None),
]


@pytest.mark.parametrize(("error", "code", "param"), ERRORS, ids=str)
@pytest.mark.parametrize("deltas", [0, 1, 2, 3])
def test_a_failure_at_any_time_ends_the_stream(error: LmaasError, code: str, param: str | None, deltas: int) -> None:
    engine = stream({"reasoning": "r"}, *words("a"), calling(0, "apply_patch", '{"input": "x'))
    answer = StreamedResponse(inference(stream=True, tools=TOOLS))
    cut = [place for place in range(len(engine)) if engine.startswith(b"data: ", place)][deltas]
    found = check(answer.feed(engine[:cut]) + answer.failed(error))
    assert found.kinds[-1] == "response.failed"
    assert found.response["error"]["code"] == code
    assert found.response["error"]["message"]
    assert found.response["error"]["param"] == param
    assert len(found.response["output"]) == max(0, deltas - 1)
    # The library's type lacks codes that OpenAI sends and that Codex tests.
    if code not in ("context_length_exceeded", "insufficient_quota"):
        for each in found.events:
            SDK.validate_python(each)


def test_a_failure_after_the_last_item() -> None:
    answer = StreamedResponse(inference(stream=True))
    found = check(answer.feed(stream(*words("a"))) + answer.failed(InternalError()))
    assert items(found.response) == [("message", "completed", "a")]
    assert found.response["usage"]["output_tokens"] == 1


def test_an_aborted_answer() -> None:
    answer = StreamedResponse(inference(stream=True))
    out = answer.feed(chunk({"content": "a"}, 1) + chunk({}, 2, "abort") + chunk({"content": "b"}, 3) + ending(3))
    assert answer.aborted
    assert answer.usage == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    events, _ = parse(out)
    assert [each["delta"] for each in events if "delta" in each] == ["a"]


def test_an_error_of_the_engine() -> None:
    answer = StreamedResponse(inference(stream=True))
    error = {"error": {"message": "EngineCore encountered an issue.", "code": 500}}
    answer.feed(chunk({"content": "a"}, 1) + event(error) + chunk({"content": "b"}, 2) + b"data: [DONE]\n\n")
    assert answer.error is not None
    assert json.loads(answer.error) == error
    assert answer.usage is not None
    assert answer.usage["completion_tokens"] == 1
    assert not answer.done


def test_an_end_without_the_whole_usage_is_no_success() -> None:
    answer = StreamedResponse(inference(stream=True))
    assert answer.usage is None
    answer.feed(chunk({"content": "a"}, 1, "stop") + b"data: [DONE]\n\n")
    assert answer.done
    assert not answer.complete


def test_an_end_without_a_reason() -> None:
    found = streamed(chunk({"content": "a"}, 1) + ending(1))
    assert items(found.response) == [("message", "completed", "a")]
    assert items(streamed(ending(1)).response) == [("message", "completed", "")]


def test_the_last_event_may_lack_its_empty_line() -> None:
    answer = StreamedResponse(inference(stream=True))
    out = answer.feed(stream(*words("a")).removesuffix(b"\n\n"))
    assert not answer.done
    assert check(out + answer.close() + answer.end()).text == "a"
    assert answer.close() == b""


@pytest.mark.parametrize(
    "bytes_",
    [
        b"data: {\n\n",
        b"data: []\n\n",
        b'data: {"choices":5}\n\n',
        b"hello\n\n",
        chunk({"content": 5}),
        chunk({"content": "a"}).replace(b'"prompt_tokens":7', b'"prompt_tokens":"7"'),
        chunk(calling(0, None, "{}")),
        chunk(calling(1, "f", "{}")) + chunk(calling(0, None, "{}")),
        chunk({"content": "a"}, logprobs={"content": 5}),
        b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n',
    ],
)
def test_bytes_that_are_no_answer(bytes_: bytes) -> None:
    answer = StreamedResponse(inference(stream=True, include=["message.output_text.logprobs"]))
    with pytest.raises(ValueError):  # noqa: PT011 (any error, by the contract)
        answer.feed(bytes_)


def test_an_event_without_an_end_is_bounded() -> None:
    answer = StreamedResponse(inference(stream=True))
    assert all(answer.feed(b"x" * 1024 * 1024) == b"" for _ in range(9))
    with pytest.raises(ValueError, match="more than"):
        answer.feed(b"x")


def test_there_is_no_mark_of_the_end() -> None:
    assert b"[DONE]" not in fed(stream(*words("a")))


def test_many_pieces_in_linear_time() -> None:
    engine = stream(*words(*["word "] * 20_000))
    found = streamed(engine, range(0, len(engine), 1000))
    assert found.text == "word " * 20_000


def test_the_response_is_what_the_client_library_knows() -> None:
    response = streamed(stream(*words("a")), tools=TOOLS, tool_choice={"type": "custom", "name": "apply_patch"}).response
    parsed = Response.model_validate(response)
    assert parsed.output_text == "a"


def test_calls_of_tools_in_a_namespace() -> None:
    function, custom = {"type": "function", "name": "close"}, {"type": "custom", "name": "write"}
    space = {"type": "namespace", "name": "agents", "description": "Others.", "tools": [function, custom]}
    engine = stream(calling(0, "agents.close", "{}"), calling(1, "agents.write", '{"input": "a"}'), calling(2, "other", "{}"))
    found = streamed(engine, tools=[space])
    named = [(item["type"], item["name"], item.get("namespace")) for item in found.response["output"]]
    assert named == [("function_call", "close", "agents"), ("custom_tool_call", "write", "agents"), ("function_call", "other", None)]
    assert [event["item"].get("namespace") for event in found.events if event["type"] == ADDED] == ["agents", "agents", None]
