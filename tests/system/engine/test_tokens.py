"""The token counts of a checker without an engine equal those of an engine: the same assertions for vLLM and for its fake."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from lmaas.engine.grammars.client import Checkers
from lmaas.engine.grammars.verdict import DETOKENIZE, INVALID, MAX_QUESTION_BYTES, TOO_COMPLEX, Prompt
from lmaas.engine.launch import VLLM
from lmaas.protocols.parameters.request import read_chat, read_completion
from tests.system.engine.conftest import BASE, CHAT, COMPLETION, MAX_LEN, Engine, total

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place — 天気.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string", "enum": ["Zürich", "Oslo"]}}, "required": ["place"]},
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Oslo"}'}}
USER = {"role": "user", "content": "Count from one to ten."}
HISTORY = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": [{"type": "text", "text": "How is the weather?"}, {"type": "text", "text": "In Oslo, please. 🌧️"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "rain, 7 °C"},
    {"role": "assistant", "content": "It rains."},
    {"role": "user", "content": "ありがとう \u200d\ufffd\x00 مرحبا"},
]
CHATS: list[dict[str, Any]] = [
    {"messages": [USER]},
    {"messages": HISTORY},
    {"messages": HISTORY, "tools": [TOOL]},
    {"messages": HISTORY, "tools": [TOOL], "tool_choice": "none"},
    {"messages": HISTORY, "tools": [TOOL], "tool_choice": "required"},
    {"messages": [USER], "response_format": {"type": "json_object"}},
    {"messages": [{"role": "user", "content": f"Turn {turn}."} for turn in range(100)]},
    {"messages": [*HISTORY, {"role": "assistant", "content": "It"}], "continue_final_message": True},
    {"messages": [USER], "add_generation_prompt": False},
    {"messages": [USER], "add_special_tokens": True},
    {"messages": [USER], "reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": [{"role": "developer", "content": "Be kind."}, USER]},
    {"messages": [{"role": "user", "content": ""}]},
]
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": "Once upon a time"},
    {"prompt": "Ünïcödé 天気 🌧️", "add_special_tokens": False},
]


#: A chat template that shows the model everything that may be in a prompt. That of the default model leaves out tools.
TEMPLATE = """\
{%- if tools %}<|im_start|>tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{{ reasoning_effort or "" }}{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"""


@pytest.fixture(scope="module")
def vllm_args(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The argument for the chat template of these tests."""
    path = tmp_path_factory.mktemp("template") / "template.jinja"
    path.write_text(TEMPLATE)
    return f"--chat-template {path}"


@pytest.fixture(scope="module")
async def checkers(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Checkers]:
    """The checkers of this machine, which end before the engine: its zygote's end waits for every process of vLLM."""
    async with Checkers(tmp_path_factory.mktemp("grammars"), None).kept() as found:
        yield found


@pytest.mark.parametrize(
    ("path", "given"),
    [*((CHAT, given) for given in CHATS), *((COMPLETION, given) for given in COMPLETIONS)],
    ids=lambda value: str(value)[:40],
)
async def test_the_count_is_that_of_the_request(engine: Engine, checkers: Checkers, path: str, given: dict[str, Any]) -> None:
    request = (read_chat if path == CHAT else read_completion)({"model": BASE, **given})
    before = await engine.idle()
    tokens = await checkers.tokens(engine.spec, Prompt(path, request.parameters, ids=True, strings=True))
    assert (tokens.code, tokens.message) == ("", "")
    assert tokens.count == len(tokens.ids) == len(tokens.strings)
    assert (await engine.counters()).since(before) == (0, 0)
    request.parameters["max_tokens"] = 1
    answer = (await engine.http.post(path, content=request.body(BASE, "salt"), headers={"content-type": "application/json"})).json()
    assert tokens.count == total(answer["usage"])[0]
    # Without the tokens themselves, which may be many.
    plain = await checkers.tokens(engine.spec, Prompt(path, request.parameters))
    assert (plain.count, plain.ids, plain.strings) == (tokens.count, [], [])


async def test_everything_in_a_chat_is_counted(engine: Engine, checkers: Checkers) -> None:
    if engine.spec.module != VLLM:
        pytest.skip("the fake engine shows no tools to its model")
    plain: dict[str, Any] = {"messages": [USER]}
    counts = []
    for more in ({}, {"tools": [TOOL]}, {"reasoning_effort": "low"}, {"chat_template_kwargs": {"enable_thinking": False}}):
        counts.append((await checkers.tokens(engine.spec, Prompt(CHAT, plain | more))).count)
    assert counts[1] > counts[0] + 50
    assert min(counts[2:]) > counts[0]


async def test_a_prompt_beyond_the_context_is_counted(engine: Engine, checkers: Checkers) -> None:
    words = "word " * MAX_LEN * 2
    tokens = await checkers.tokens(engine.spec, Prompt(CHAT, {"messages": [{"role": "user", "content": words}]}))
    assert tokens.count > MAX_LEN * 2
    assert tokens.code == ""


async def test_an_empty_text_has_no_tokens(engine: Engine, checkers: Checkers) -> None:
    tokens = await checkers.tokens(engine.spec, Prompt(COMPLETION, {"prompt": ""}, ids=True))
    assert (tokens.code, tokens.count, tokens.ids) == ("", 0, [])


async def test_not_all_tokens_of_a_long_prompt_are_returned(engine: Engine, checkers: Checkers) -> None:
    if engine.spec.module != VLLM:
        pytest.skip("the fake engine reads any prompt")
    long: dict[str, Any] = {"prompt": "a b " * 100_001}
    tokens = await checkers.tokens(engine.spec, Prompt(COMPLETION, long, ids=True))
    assert (tokens.code, tokens.ids) == (TOO_COMPLEX, [])
    assert (await checkers.tokens(engine.spec, Prompt(COMPLETION, long))).count > 200_000


async def test_tokens_become_text_again(engine: Engine, checkers: Checkers) -> None:
    text = "Ünïcödé 天気 🌧️ and words"
    tokens = await checkers.tokens(engine.spec, Prompt(COMPLETION, {"prompt": text, "add_special_tokens": False}, ids=True))
    back = await checkers.tokens(engine.spec, Prompt(DETOKENIZE, {"tokens": tokens.ids}))
    assert back.count == tokens.count
    assert back.text == text or engine.spec.module != VLLM


async def test_what_an_engine_would_refuse_is_refused(engine: Engine, checkers: Checkers) -> None:
    if engine.spec.module != VLLM:
        pytest.skip("the fake engine reads any prompt")
    for prompt, param in (
        (Prompt(DETOKENIZE, {"tokens": [5, 10**9]}), "tokens"),
        (Prompt(CHAT, {"messages": [{"role": "user", "content": "x"}], "tools": "many"}), ""),
    ):
        tokens = await checkers.tokens(engine.spec, prompt)
        assert (tokens.code, tokens.param) == (INVALID, param), prompt
        assert tokens.message
        assert "/" not in tokens.message


async def test_a_prompt_that_takes_too_much_is_refused_and_others_are_read(engine: Engine, checkers: Checkers) -> None:
    if engine.spec.module != VLLM:
        pytest.skip("the fake engine reads any prompt")
    huge = Prompt(COMPLETION, {"prompt": "a1 b2 " * 1_300_000})
    assert (await checkers.tokens(engine.spec, huge)).code == TOO_COMPLEX
    assert (await checkers.tokens(engine.spec, Prompt(COMPLETION, {"prompt": "x" * MAX_QUESTION_BYTES}))).code == TOO_COMPLEX
    assert (await checkers.tokens(engine.spec, Prompt(COMPLETION, {"prompt": "a"}))).count == 1
