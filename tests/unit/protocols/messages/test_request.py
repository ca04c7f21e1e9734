"""Requests of the Messages protocol, and the chats that are made of them."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmaas.errors import InvalidRequest
from lmaas.protocols.messages.protocol import Messages
from lmaas.protocols.messages.request import MessagesRequest, read_count_tokens, read_messages
from lmaas.protocols.messages.table import MESSAGES
from tests.unit.protocols.messages.build import BODY, TOOL, USER
from tests.unit.protocols.parameters.build import model

CACHED = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


def chat(**more: Any) -> dict[str, Any]:
    """Return the parameters of the chat for a request with these fields."""
    return read_messages(BODY | more).parameters


def messages(*given: Any) -> list[dict[str, Any]]:
    """Return the chat's messages for these messages."""
    found: list[dict[str, Any]] = chat(messages=list(given))["messages"]
    return found


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value} | more


def result(content: Any = "42", **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": content} | more


def document(**source: Any) -> dict[str, Any]:
    return {"type": "document", "source": source}


CALL = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}}
EMPTY_THOUGHT = {"type": "thinking", "thinking": "", "signature": ""}
BRIEF = {"role": "system", "content": "Be brief."}
REMINDER = "<system-reminder>\nBe brief.\n</system-reminder>"
ONE_AT_A_TIME = {"type": "auto", "disable_parallel_tool_use": True}
PDF = document(type="base64", media_type="application/pdf", data="x")
CALLED = {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def test_a_short_request() -> None:
    request = read_messages(BODY)
    assert request.parameters == {
        "messages": [USER],
        "chat_template_kwargs": {"enable_thinking": False, "thinking": False},
        "max_tokens": 100,
    }
    assert (request.model, request.stream, request.weight, request.prompts, request.service_tier) == ("robot", False, 1, 1, "default")
    assert not request.constrained


def test_what_claude_code_sends() -> None:
    body = {
        "model": "claude-sonnet-4-5-20250929",
        "messages": [
            user(text("<system-reminder>Today is Monday.</system-reminder>"), text("Read a.py", **CACHED)),
            assistant(
                {"type": "thinking", "thinking": "Hm", "signature": "sig_1"},
                text("I read it.", citations=None),
                CALL | {"caller": {"type": "direct"}} | CACHED,
            ),
            user(result([text("1\tprint()")], is_error=False, **CACHED), text("[Request interrupted by user]")),
            {"role": "system", "content": "The user has selected a.py."},
        ],
        "system": [
            text("x-anthropic-billing-header: cc_version=2.1.0; cch=1f3;"),
            text("You are Claude Code.", **CACHED),
            text("\nYou are an interactive tool.", **CACHED),
        ],
        "tools": [
            TOOL | CACHED | {"description": "Does f.", "eager_input_streaming": True, "strict": None, "input_examples": [{"a": 1}]},
            {"name": "mcp__server__tool", "description": "", "input_schema": {"$schema": "x", **SCHEMA}, "type": "custom"},
        ],
        "metadata": {"user_id": "user_1_account__session_2"},
        "max_tokens": 32000,
        "temperature": 1,
        "thinking": {"type": "enabled", "budget_tokens": 31999},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "medium"},
        "service_tier": "auto",
        "stream": True,
        "tool_choice": None,
        "mcp_servers": [],
        "container": None,
        "speed": "standard",
    }
    request = read_messages(body)
    assert request.stream
    assert request.shows_thinking
    assert request.parameters["messages"] == [
        {"role": "system", "content": "You are Claude Code.\n\nYou are an interactive tool."},
        {"role": "user", "content": "<system-reminder>Today is Monday.</system-reminder>\nRead a.py"},
        {"role": "assistant", "content": "I read it.", "reasoning": "Hm", "tool_calls": [CALLED]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "1\tprint()"},
        {
            "role": "user",
            "content": "[Request interrupted by user]\n<system-reminder>\nThe user has selected a.py.\n</system-reminder>",
        },
    ]
    assert [tool["function"]["name"] for tool in request.parameters["tools"]] == ["f", "mcp__server__tool"]
    assert request.parameters["reasoning_effort"] == "medium"
    assert request.parameters["chat_template_kwargs"] == {"enable_thinking": True, "thinking": True}
    assert json.loads(request.body("engine", "salt"))["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Hi"}]),
        ([user()], [{"role": "user", "content": ""}]),
        ([user(text("a"), text(""), text("b"))], [{"role": "user", "content": "a\nb"}]),
        # Consecutive messages of one role become one.
        ([USER, USER], [{"role": "user", "content": "Hello\nHello"}]),
        (
            [USER, assistant(text("a")), assistant(text("b"), CALL), user(result())],
            [
                USER,
                {"role": "assistant", "content": "ab", "tool_calls": [CALLED]},
                {"role": "tool", "tool_call_id": "toolu_1", "content": "42"},
            ],
        ),
        (
            [USER, assistant(CALL), user(text("and"), result(), result())],
            [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALLED]},
                *[{"role": "tool", "tool_call_id": "toolu_1", "content": "42"}] * 2,
                {"role": "user", "content": "and"},
            ],
        ),
        # An instruction in the middle of the conversation.
        ([USER, BRIEF], [{"role": "user", "content": f"Hello\n{REMINDER}"}]),
        ([USER, BRIEF, USER], [{"role": "user", "content": f"Hello\n{REMINDER}\nHello"}]),
        ([BRIEF, BRIEF, USER], [{"role": "system", "content": "Be brief.\nBe brief."}, USER]),
        ([USER, assistant(text("a")), BRIEF], [USER, {"role": "assistant", "content": "a"}, {"role": "user", "content": REMINDER}]),
        (
            [USER, assistant(CALL), BRIEF, user(result(), text("b"))],
            [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALLED]},
                {"role": "tool", "tool_call_id": "toolu_1", "content": "42"},
                {"role": "user", "content": f"{REMINDER}\nb"},
            ],
        ),
        ([USER, {"role": "system", "content": [text("x-anthropic-billing-header: 1")]}], [USER]),
        # Thoughts.
        (
            [
                USER,
                assistant({"type": "redacted_thinking", "data": "x"}, {"type": "thinking", "thinking": "", "signature": ""}, text("a")),
                USER,
            ],
            [USER, {"role": "assistant", "content": "a"}, USER],
        ),
    ],
)
def test_messages(given: list[Any], expected: list[Any]) -> None:
    assert messages(*given) == expected


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (result("a"), "a"),
        (result(None), ""),
        (result([]), ""),
        (result([text("a"), text("b")]), "a\nb"),
        (result("no such file", is_error=True), "Error: no such file"),
        (result("Error: no such file", is_error=True), "Error: no such file"),
        (result("", is_error=True), "Error: "),
        (result("a", is_error=None), "a"),
        (result([document(type="text", media_type="text/plain", data="a")]), "a"),
        (result([{"type": "tool_reference", "tool_name": "g"}]), "The tool 'g' is available."),
    ],
)
def test_results_of_tools(block: dict[str, Any], expected: str) -> None:
    assert messages(USER, assistant(CALL), user(block))[-1] == {"role": "tool", "tool_call_id": "toolu_1", "content": expected}


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (document(type="text", media_type="text/plain", data="a"), "a"),
        (document(type="text", data="a") | {"title": "T", "context": "C", "citations": {"enabled": False}}, "T\nC\na"),
        (document(type="content", content="a") | {"title": None}, "a"),
        (document(type="content", content=[text("a"), text("b")]), "a\nb"),
        ({"type": "search_result", "title": "T", "source": "https://x", "content": [text("a")]}, "T\nhttps://x\na"),
    ],
)
def test_documents(block: dict[str, Any], expected: str) -> None:
    assert messages(user(block)) == [{"role": "user", "content": expected}]


def test_an_answer_is_accepted_back() -> None:
    broken = {"type": "tool_use", "id": "toolu_2", "name": "f", "input": {"invalid_arguments": '{"a": '}}
    found = messages(USER, assistant({"type": "thinking", "thinking": "Hm", "signature": "sig_1"}, text("a"), CALL, broken), user(result()))
    assert found[1]["reasoning"] == "Hm"
    assert found[1]["tool_calls"][1]["function"]["arguments"] == '{"invalid_arguments": "{\\"a\\": "}'


def test_a_conversation_of_many_short_messages_is_read_in_linear_time() -> None:
    began = time.process_time()
    many = [{"role": role, "content": "x" * 800} for role in ("user", "assistant") for _ in range(4999)]
    (said, answered), last = messages(*many, USER)[:2], messages(*many, USER)[2]
    assert [len(said["content"]), len(answered["content"]), last] == [4999 * 801 - 1, 4999 * 800, USER]
    # Copying the text for each message would take more than ten seconds.
    assert time.process_time() - began < 3


def test_a_prefilled_answer_is_continued() -> None:
    found = chat(messages=[USER, assistant(text("The answer is ("))])
    assert found["messages"][-1] == {"role": "assistant", "content": "The answer is ("}
    assert (found["continue_final_message"], found["add_generation_prompt"]) == (True, False)


@pytest.mark.parametrize(
    ("tools", "choice", "expected"),
    [
        ([TOOL], None, {"tools": ["f"]}),
        ([TOOL], {"type": "auto"}, {"tools": ["f"], "tool_choice": "auto"}),
        ([TOOL], {"type": "any"}, {"tools": ["f"], "tool_choice": "required"}),
        ([TOOL], {"type": "none"}, {"tools": ["f"], "tool_choice": "none"}),
        ([TOOL], {"type": "tool", "name": "f"}, {"tools": ["f"], "tool_choice": {"type": "function", "function": {"name": "f"}}}),
        (
            [TOOL],
            {"type": "auto", "disable_parallel_tool_use": True},
            {"tools": ["f"], "tool_choice": "auto", "parallel_tool_calls": False},
        ),
        ([TOOL], {"type": "auto", "disable_parallel_tool_use": False, "name": None}, {"tools": ["f"], "tool_choice": "auto"}),
        ([], ONE_AT_A_TIME, {}),
        ([], None, {}),
        ([TOOL, TOOL | {"name": "g", "defer_loading": True}], None, {"tools": ["f"]}),
        ([TOOL, TOOL | {"name": "called", "defer_loading": True}], None, {"tools": ["f", "called"]}),
        ([TOOL, TOOL | {"name": "found", "defer_loading": True}], None, {"tools": ["f", "found"]}),
        (
            [TOOL, TOOL | {"name": "g", "defer_loading": True}],
            {"type": "tool", "name": "g"},
            {"tools": ["f", "g"], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        ),
    ],
)
def test_tools(tools: list[Any], choice: Any, expected: dict[str, Any]) -> None:
    history = [USER, assistant(CALL | {"name": "called"}), user(result([{"type": "tool_reference", "tool_name": "found"}]))]
    found = chat(tools=tools, tool_choice=choice, messages=history)
    names = {"tools": [tool["function"]["name"] for tool in found["tools"]]} if "tools" in found else {}
    assert names | {name: found[name] for name in ("tool_choice", "parallel_tool_calls") if name in found} == expected


def test_a_tool() -> None:
    tool = TOOL | {"description": "Does f.", "strict": True, "allowed_callers": ["direct"], "unknown": 1}
    function = {"name": "f", "description": "Does f.", "parameters": TOOL["input_schema"], "strict": True}
    assert chat(tools=[tool])["tools"] == [{"type": "function", "function": function}]


def test_hundreds_of_tools() -> None:
    assert len(chat(tools=[TOOL | {"name": f"t{number}"} for number in range(500)])["tools"]) == 500


@pytest.mark.parametrize(
    ("given", "thinks", "shows"),
    [
        ({}, False, False),
        ({"thinking": None}, False, False),
        ({"thinking": {"type": "disabled"}}, False, False),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, True, True),
        ({"thinking": {"type": "enabled"}}, True, True),
        ({"thinking": {"type": "adaptive", "display": "summarized", "block_binding": {"x": 1}}}, True, True),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, True, False),
        ({"thinking": {"type": "between_tools"}}, True, True),
    ],
)
def test_thinking(given: dict[str, Any], thinks: bool, shows: bool) -> None:
    request = read_messages(BODY | given)
    assert request.parameters["chat_template_kwargs"] == {"enable_thinking": thinks, "thinking": thinks}
    assert request.shows_thinking is shows


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, "output_config.format"),
        ({"output_config": {"format": None}, "output_format": {"type": "json_schema", "schema": SCHEMA}}, "output_format"),
    ],
)
def test_structured_output(given: dict[str, Any], field: str) -> None:
    request = read_messages(BODY | given)
    assert request.parameters["response_format"] == {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    assert request.constrained
    assert request.grammar_field == field


def test_parameters_of_sampling() -> None:
    found = chat(temperature=0.5, top_p=0.9, top_k=5, stop_sequences=["END"], max_tokens=7.0)
    expected = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "stop": ["END"], "max_tokens": 7}
    assert found | expected == found
    assert "stop" not in chat(stop_sequences=[])


@pytest.mark.parametrize(("asked", "sent"), [(100, 100), (32_000, 4096)])
def test_the_limit_is_bounded_by_the_context(asked: int, sent: int) -> None:
    request = read_messages(BODY | {"max_tokens": asked})
    request.check(model(4096))
    assert request.parameters["max_tokens"] == sent
    assert request.max_tokens == asked


def test_counting_needs_no_limit() -> None:
    body = {"model": "robot", "messages": [USER], "system": "Be brief.", "tools": [TOOL], "tool_choice": {"type": "auto"}}
    request = read_count_tokens(body | {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}, "speed": "fast"})
    assert [message["role"] for message in request.parameters["messages"]] == ["system", "user"]
    assert len(request.parameters["tools"]) == 1
    assert "max_tokens" not in request.parameters
    request.check(model(4096))
    assert "max_tokens" not in request.parameters


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
REFUSED = [
    ({"max_tokens": None}, "missing_parameter", "max_tokens"),
    ({"max_tokens": 0}, "out_of_range", "max_tokens"),
    ({"max_tokens": "5"}, "invalid_type", "max_tokens"),
    ({"messages": None}, "missing_parameter", "messages"),
    ({"messages": []}, "empty_prompt", "messages"),
    ({"messages": [BRIEF]}, "empty_prompt", "messages"),
    ({"messages": "hi"}, "invalid_type", "messages"),
    ({"messages": ["hi"]}, "invalid_type", "messages.0"),
    ({"messages": [USER, {"role": "tool", "content": "x"}]}, "invalid_type", "messages.1"),
    ({"messages": [{"role": "user", "content": 7}]}, "invalid_type", "messages.0.content"),
    ({"messages": [user("hi")]}, "invalid_type", "messages.0.content.0"),
    ({"messages": [user({"text": "hi"})]}, "invalid_type", "messages.0.content.0"),
    ({"messages": [user(text("a"), {"type": "text"})]}, "invalid_type", "messages.0.content.1.text"),
    ({"messages": [user(text("a"), IMAGE)]}, "unsupported_content", "messages.0.content.1"),
    ({"messages": [user(CALL)]}, "unsupported_content", "messages.0.content.0"),
    ({"messages": [USER, assistant(result()), USER]}, "unsupported_content", "messages.1.content.0"),
    ({"messages": [USER, assistant({"type": "server_tool_use", "id": "x"}), USER]}, "unsupported_content", "messages.1.content.0"),
    ({"messages": [USER, assistant(CALL | {"input": "x"}), USER]}, "invalid_type", "messages.1.content.0.input"),
    ({"messages": [USER, assistant(CALL | {"id": None}), USER]}, "invalid_type", "messages.1.content.0.id"),
    ({"messages": [USER, assistant({"type": "thinking"}), USER]}, "invalid_type", "messages.1.content.0.thinking"),
    ({"messages": [USER, assistant(CALL), user(result([IMAGE]))]}, "unsupported_content", "messages.2.content.0.content.0"),
    ({"messages": [user(result(tool_use_id=7))]}, "invalid_type", "messages.0.content.0.tool_use_id"),
    ({"messages": [user(result(is_error="yes"))]}, "invalid_type", "messages.0.content.0.is_error"),
    (
        {"messages": [user(PDF)]},
        "unsupported_content",
        "messages.0.content.0.source",
    ),
    ({"messages": [user(document(type="url", url="http://x"))]}, "unsupported_content", "messages.0.content.0.source"),
    ({"messages": [user(document(type="content", content=[IMAGE]))]}, "unsupported_content", "messages.0.content.0.source.content.0"),
    ({"messages": [user({"type": "document"})]}, "invalid_type", "messages.0.content.0.source"),
    (
        {"messages": [user(document(type="text", data="a") | {"citations": {"enabled": True}})]},
        "unsupported_parameter",
        "messages.0.content.0.citations",
    ),
    ({"messages": [USER, assistant()]}, "invalid_request", "messages.1"),
    ({"messages": [USER, assistant(text(" "))]}, "invalid_request", "messages.1"),
    ({"messages": [USER, assistant(text("a"), CALL)]}, "invalid_request", "messages.1"),
    ({"messages": [{"role": "system", "content": [CALL]}]}, "unsupported_content", "messages.0.content.0"),
    ({"system": 7}, "invalid_type", "system"),
    ({"system": [IMAGE]}, "unsupported_content", "system.0"),
    ({"tools": {}}, "invalid_type", "tools"),
    ({"tools": ["f"]}, "invalid_type", "tools.0"),
    ({"tools": [TOOL, {"name": "f"}]}, "invalid_schema", "tools.1.input_schema"),
    ({"tools": [TOOL | {"name": ""}]}, "invalid_type", "tools.0.name"),
    ({"tools": [TOOL | {"name": 'a"b'}]}, "invalid_type", "tools.0.name"),
    ({"tools": [TOOL | {"description": 7}]}, "invalid_type", "tools.0.description"),
    ({"tools": [TOOL | {"strict": 1}]}, "invalid_type", "tools.0.strict"),
    ({"tools": [TOOL | {"defer_loading": 1}]}, "invalid_type", "tools.0.defer_loading"),
    *(
        ({"tools": [TOOL, {"type": kind, "name": "x"}]}, "unsupported_parameter", "tools.1.type")
        for kind in (
            "web_search_20250305",
            "web_fetch_20250910",
            "code_execution_20250825",
            "computer_20250124",
            "computer_toolset_20260801",
            "bash_20250124",
            "text_editor_20250728",
            "memory_20250818",
            "tool_search_tool_regex_20251119",
            "mcp_toolset",
            "advisor_20260301",
            7,
        )
    ),
    ({"tool_choice": "auto"}, "invalid_type", "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "invalid_type", "tool_choice"),
    ({"tool_choice": {"type": "any"}}, "invalid_request", "tool_choice"),
    ({"tool_choice": {"type": "tool"}}, "invalid_type", "tool_choice.name"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "out_of_range", "tool_choice"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}},
        "invalid_type",
        "tool_choice.disable_parallel_tool_use",
    ),
    ({"thinking": True}, "invalid_type", "thinking"),
    ({"thinking": {"type": "maybe"}}, "invalid_type", "thinking"),
    ({"thinking": {"type": "enabled", "budget_tokens": "many"}}, "invalid_type", "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "display": 7}}, "out_of_range", "thinking.display"),
    ({"output_config": []}, "invalid_type", "output_config"),
    ({"output_config": {"effort": "huge"}}, "out_of_range", "output_config.effort"),
    ({"output_config": {"format": {"type": "text"}}}, "invalid_type", "output_config.format"),
    ({"output_config": {"format": {"type": "json_schema", "schema": []}}}, "invalid_schema", "output_config.format"),
    (
        {
            "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
            "output_format": {"type": "json_schema", "schema": SCHEMA},
        },
        "invalid_request",
        "output_format",
    ),
    ({"stop_sequences": "END"}, "invalid_type", "stop_sequences"),
    ({"stop_sequences": list("abcde")}, "out_of_range", "stop_sequences"),
    ({"stream": "yes"}, "invalid_type", "stream"),
    ({"temperature": 3}, "out_of_range", "temperature"),
    ({"top_k": 1.5}, "invalid_type", "top_k"),
    ({"metadata": "x"}, "invalid_type", "metadata"),
    ({"service_tier": "priority"}, "out_of_range", "service_tier"),
    ({"speed": "light"}, "out_of_range", "speed"),
    ({"container": "container_1"}, "unsupported_parameter", "container"),
    ({"mcp_servers": [{"type": "url", "url": "https://x", "name": "x"}]}, "unsupported_parameter", "mcp_servers"),
    ({"inference_geo": "us"}, "unsupported_parameter", "inference_geo"),
    ({"thread": {"type": "create"}}, "thread_unsupported_request", "thread"),
    ({"frequency_penalty": 1}, "unsupported_parameter", "frequency_penalty"),
    ({"n": 2}, "unsupported_parameter", "n"),
    ({"model": None}, "missing_parameter", "model"),
]


@pytest.mark.parametrize(("more", "code", "param"), REFUSED)
def test_bad_requests(more: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_messages(BODY | more)
    assert (refused.value.error_code, refused.value.param) == (code, param)


def test_input_that_is_nested_too_deeply() -> None:
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"a": deep}
    for more, param in (
        ({"messages": [USER, assistant(CALL | {"input": deep}), user(result())]}, "messages.1.content.0.input"),
        ({"tools": [TOOL | {"input_schema": deep}]}, "tools"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            read_messages(BODY | more)
        assert refused.value.param == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("type", "text", "role", "content", "name", "id", "input", "source", "data", "thinking", "tool_use_id", "is_error", "citations")
KINDS = ("text", "tool_use", "tool_result", "document", "thinking", "redacted_thinking", "image", "search_result", "tool_reference")
ODD = st.dictionaries(st.sampled_from(FIELDS), JSON | st.sampled_from(KINDS), max_size=6) | JSON
ODD_BLOCK = st.fixed_dictionaries({"type": st.sampled_from(KINDS)}, optional=dict.fromkeys(FIELDS[1:], ODD | st.lists(ODD, max_size=2)))
ODD_BLOCKS = st.lists(ODD_BLOCK, max_size=3)
ODD_MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(("user", "assistant", "system"))}, optional={"content": ODD_BLOCKS | ODD})
ODD_FIELDS = st.dictionaries(st.sampled_from(sorted(MESSAGES.by_name)), ODD | ODD_BLOCKS, max_size=4)


def outcome(body: dict[str, Any]) -> tuple[MessagesRequest | None, InvalidRequest | None]:
    """Return the request that is read, or the error."""
    try:
        return read_messages(body), None
    except InvalidRequest as refused:
        return None, refused


@given(st.lists(ODD_MESSAGE | ODD, max_size=4), ODD_FIELDS)
def test_odd_requests_are_read_or_refused_by_name(odd: list[Any], more: dict[str, Any]) -> None:
    for body in (BODY | {"messages": odd}, BODY | more, BODY | more | {"messages": odd}):
        request, refused = outcome(body)
        if request is not None:
            request.check(model(4096))
            assert json.loads(request.body("engine", "salt"))["messages"]
            assert min(request.estimate(4096)) > 0
        elif refused is not None:
            assert refused.param is not None
            assert refused.param.split(".")[0] in body
            assert len(refused.message) < 500


def test_the_protocol_reads_its_requests() -> None:
    protocol = Messages()
    request = protocol.read(BODY)
    assert isinstance(request, MessagesRequest)
    assert protocol.engine_ids("req_1", request) == ["chatcmpl-req_1"]
    assert request.clients_name("stop") == "stop_sequences"
    assert request.clients_name("cache_salt") is None
    assert request.estimate(4096)[1] == 100
