"""vLLM's own request models accept the bodies that the gateway forwards, without an engine."""

import json
import subprocess
import sys
from typing import Any

import pytest

from lmaas.engine.launch import has_engine
from lmaas.protocols.messages.request import read_messages
from lmaas.protocols.parameters.enforceable import enforceable
from lmaas.protocols.parameters.request import read_chat, read_completion
from lmaas.protocols.parameters.table import CHAT, COMPLETION, Table, Treatment
from lmaas.protocols.pooling.embeddings import TABLE as EMBEDDINGS
from lmaas.protocols.pooling.embeddings import read_embeddings
from lmaas.protocols.pooling.ranking import RERANK, read_rerank
from lmaas.protocols.responses.request import read_response
from lmaas.states import PoolKind
from lmaas.store.models import BaseModel

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": CITY}}
CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TAG = {"type": "structural_tag", "format": {"type": "const_string", "value": "abc"}}

#: A value for each parameter that is forwarded.
VALUES: dict[str, list[Any]] = {
    "messages": [
        [{"role": "user", "content": "x"}],
        [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}, {"type": "refusal", "refusal": "x"}]}],
        [{"role": "system", "content": None}, {"role": "developer", "content": []}, {"role": "tool", "content": None}],
        [{"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "annotations": [], "audio": None}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"cut'}}]}, {"role": "tool", "content": "5"}],
        [{"role": "assistant", "function_call": {"name": "f", "arguments": ""}}, {"role": "function", "name": "f", "content": "5"}],
        [{"role": "assistant", "content": "x", "reasoning": "hm", "reasoning_content": "hm", "name": "n", "unknown": {"a": 1}}],
    ],
    "prompt": ["x", ["x", "y"], [1, 2], [[1], [2, 3]]],
    "chat_template_kwargs": [{"enable_thinking": False, "thinking_budget": 5}],
    "reasoning_effort": ["none", "minimal", "low", "medium", "high", "xhigh", "max"],
    "truncate_prompt_tokens": [-1, 1, 100],
    "truncation_side": ["left"],
    "tools": [[TOOL], [{"type": "function", "function": {"name": "f"}}], []],
    "tool_choice": ["none", "auto"],
    "functions": [[{"name": "f", "parameters": CITY}]],
    "function_call": ["auto", "none"],
    "response_format": [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"schema": CITY}},
        {"type": "json_object", "schema": CITY},
        TAG,
    ],
    "structured_outputs": [
        {"json": CITY},
        {"json": json.dumps(CITY)},
        {"regex": "a+"},
        {"choice": ["a"]},
        {"grammar": 'root ::= "a"'},
        {"json_object": True, "disable_any_whitespace": True},
        {"structural_tag": TAG},
    ],
    "guided_json": [CITY],
    "guided_regex": ["a"],
    "guided_choice": [["a"]],
    "guided_grammar": ['root ::= "a"'],
    "temperature": [0, 2],
    "top_p": [0, 1],
    "top_k": [-1, 0, 1_000_000],
    "min_p": [0, 1],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2],
    "repetition_penalty": [0.01, 10],
    "logit_bias": [{"5": 1}, {}],
    "seed": [-(2**63), 2**63 - 1],
    "n": [1, 128],
    "best_of": [1],
    "max_tokens": [1, 1_000_000],
    "max_completion_tokens": [1, 1_000_000],
    "min_tokens": [0, 5],
    "stop": ["x", ["a", "b", "c", "d"], []],
    "stop_token_ids": [[], [1, 2]],
    "logprobs": [True],
    "top_logprobs": [0],
    "prompt_logprobs": [0, 20],
    "stream_options": [{}],
    "service_tier": ["auto"],
}


def bodies(table: Table) -> list[Any]:
    """Requests that are accepted, as the engine receives them: one for each value of each parameter."""
    read, plain = (
        (read_chat, {"model": "m", "messages": VALUES["messages"][0]})
        if table is CHAT
        else (read_completion, {"model": "m", "prompt": "x"})
    )
    found = []
    for item in table.parameters:
        if item.treatment is Treatment.FORWARDED:
            needed = {"truncation_side": {"truncate_prompt_tokens": 5}}.get(item.name, {})
            found += [plain | needed | {item.name: value} for value in VALUES.get(item.name, [True, False])]
    if table is CHAT:
        found.append(plain | {"logprobs": True, "top_logprobs": 20, "stream": True})
        found.append(plain | {"n": 2, "temperature": 0})
        found += [
            plain | {"tools": [TOOL], "tool_choice": choice} for choice in ("required", {"type": "function", "function": {"name": "f"}})
        ]
    else:
        found += [
            plain | {"echo": True, "logprobs": 1, "max_tokens": limit, "stream": stream} for limit in (0, 1) for stream in (True, False)
        ]
    return [json.loads(read(body).body("engine", "salt")) for body in found]


def messages() -> list[Any]:
    """The chats that correspond to requests of other protocols."""
    plain: dict[str, Any] = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    call = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "5"}
    tool = {"name": "f", "input_schema": CITY, "strict": True}
    history = [{"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, call]}, {"role": "user", "content": [result]}]
    more: list[dict[str, Any]] = [
        {"messages": plain["messages"] + history},
        {"messages": [*plain["messages"], {"role": "assistant", "content": "y"}]},
        {
            "system": "s",
            "thinking": {"type": "enabled", "budget_tokens": 5},
            "stop_sequences": ["x"],
            "top_k": 0,
            "top_p": 0,
            "temperature": 0,
        },
        {"output_config": {"effort": "max", "format": {"type": "json_schema", "schema": CITY}}},
        *(
            {"tools": [tool], "tool_choice": {"type": kind, "name": "f", "disable_parallel_tool_use": True}}
            for kind in ("auto", "any", "tool", "none")
        ),
    ]
    return [
        json.loads(read_messages(plain | each | {"stream": stream}).body("engine", "salt")) for each in more for stream in (False, True)
    ]


def responses() -> list[Any]:
    """The chats that correspond to requests of the Responses API."""
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    custom = {"type": "custom_tool_call", "call_id": "d", "name": "g", "input": "x"}
    results = [{"type": kind, "call_id": "c", "output": "5"} for kind in ("function_call_output", "custom_tool_call_output")]
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    thoughts = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    said = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    tools = [
        {"type": "function", "name": "f", "parameters": CITY, "strict": True},
        {"type": "custom", "name": "g", "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"}},
        {"type": "namespace", "name": "n", "description": "d", "tools": [{"type": "function", "name": "h"}]},
    ]
    more: list[dict[str, Any]] = [
        {"instructions": "s", "input": [thoughts, said, call, custom, *results, {"role": "developer", "content": parts}, thoughts]},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 20, "reasoning": {"effort": "max"}, "max_output_tokens": 5},
        *({"text": {"format": {"type": kind, "name": "n", "schema": CITY}}} for kind in ("text", "json_object", "json_schema")),
        *(
            {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
            for choice in ("auto", "required", "none", {"type": "function", "name": "f"}, {"type": "custom", "name": "g"})
        ),
    ]
    plain: dict[str, Any] = {"model": "m", "input": "x"}
    return [
        json.loads(read_response(plain | each | {"stream": stream}).body("engine", "salt")) for each in more for stream in (False, True)
    ]


#: A value for each parameter of embeddings and rankings that the engine receives and that has no value above.
POOLED: dict[str, list[Any]] = {
    "input": ["x", ["x"], [1], [[1], [2]]],
    "encoding_format": ["float", "base64"],
    "dimensions": [64],
    "query": ["q"],
    "documents": [["x"], [{"text": "x"}]],
    "top_n": [1],
    "max_tokens_per_query": [5],
    "max_tokens_per_doc": [5],
}


def pooled(table: Table) -> list[Any]:
    """Requests for embeddings or rankings that are accepted, as the engine receives them."""
    base = BaseModel("", "base", "", "float32", {}, 8, 8, 8, 16, 256, 0, "", PoolKind.EMBED)
    plain: dict[str, Any] = {"model": "m"} | ({"input": "x"} if table is EMBEDDINGS else {"query": "q", "documents": ["x"]})
    found = []
    for item in table.parameters:
        if item.treatment is Treatment.FORWARDED:
            needed = {"truncation_side": {"truncate_prompt_tokens": 5}}.get(item.name, {})
            for value in (POOLED | VALUES).get(item.name, [True, False]):
                request = (read_embeddings if table is EMBEDDINGS else read_rerank)(plain | needed | {item.name: value})
                request.check(base)
                found.append(json.loads(request.body("engine", "salt")))
    return found


@pytest.mark.skipif(not has_engine(), reason="vLLM is not installed")
def test_vllms_request_models_take_what_is_forwarded() -> None:
    code = """
import json, sys, warnings
warnings.simplefilter("ignore")
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.pooling.embed.protocol import EmbeddingCompletionRequest
from vllm.entrypoints.pooling.scoring.protocol import ScoreTextRequest
kinds = (ChatCompletionRequest, CompletionRequest, EmbeddingCompletionRequest, ScoreTextRequest)
for kind, bodies in zip(kinds, json.load(sys.stdin), strict=True):
    for body in bodies:
        try:
            request = kind.model_validate(body)
            request.to_pooling_params() if hasattr(request, "to_pooling_params") else request.to_sampling_params(5, {})
            if unknown := set(body) - set(kind.model_fields):
                raise ValueError(f"vLLM does not know {unknown}")
        except Exception as error:
            print("REFUSED", json.dumps(body), repr(error))
"""
    # A body that vLLM refuses shows that the others could have failed.
    sent = json.dumps(
        [[*bodies(CHAT), *messages(), *responses(), {"messages": [], "n": "many"}], bodies(COMPLETION), pooled(EMBEDDINGS), pooled(RERANK)]
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], input=sent, check=True, capture_output=True, text=True)
    (refused,) = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert '"n": "many"' in refused


#: Parts of schemas, some of which the engine's grammar library refuses.
PARTS: list[dict[str, Any]] = [
    *(
        {"type": "string", "pattern": pattern}
        for pattern in (r"\p{L}", r"a\b", r"(a)\1", r"(?<n>a)\k<n>", "(?#x)a", "(?>a)", "(?i:a)", "(?<=a)b", r"\\\p{L}")
    ),
    *(
        {"type": "string", "pattern": pattern}
        for pattern in (r"^\d+$", "(?:a|b)+", "^(?!b)(?=a).+$", "(?<n>a)", "(?P<n>a)", "(?i)a", r"\\p")
    ),
    *({"type": "integer", "maximum": bound} for bound in (0.5, 2**63, 2**63 - 1, 1e18, 5)),
    *({"type": "integer", "minimum": bound} for bound in (-(2**63), -(2**63) - 1)),
    {"type": "number", "maximum": 0.5},
]


@pytest.mark.skipif(not has_engine(), reason="vLLM is not installed")
def test_what_is_left_out_of_a_schema_is_what_the_grammar_library_refuses() -> None:
    code = """
import json, sys
import xgrammar
from xgrammar.structural_tag import JSONSchemaFormat, TagFormat
for part in json.load(sys.stdin):
    content = JSONSchemaFormat(json_schema={"type": "object", "properties": {"a": part}})
    try:
        xgrammar.Grammar.from_structural_tag(xgrammar.StructuralTag(format=TagFormat(begin="<a>", content=content, end="</a>")))
        print("TAKEN")
    except Exception:
        print("REFUSED")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], input=json.dumps(PARTS), check=True, capture_output=True, text=True)
    taken = [line == "TAKEN" for line in done.stdout.splitlines() if line in ("TAKEN", "REFUSED")]
    assert [(part, enforceable(part) == part) for part in PARTS] == list(zip(PARTS, taken, strict=True))
