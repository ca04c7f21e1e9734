"""The engine's log contains no text of tenants, and stays small."""

import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from lmaas.config import Settings
from lmaas.engine.launch import EngineProcess, EngineSpec
from tests.support.conditions import until
from tests.system.engine.running import running

MARKER = "MaRkEr5e4c2f"
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
#: The most that one request may add to the log, in bytes.
MAX_GROWTH = 4096


def schema(**what: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": MARKER, "schema": what}}}


def tool(name: str = MARKER, **parameters: Any) -> dict[str, Any]:
    function = {"name": name, "description": MARKER, "parameters": parameters, "strict": True}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


def called(arguments: str) -> dict[str, Any]:
    call = {"id": MARKER, "type": "function", "function": {"name": MARKER, "arguments": arguments}}
    messages = [{"role": "user", "content": MARKER}, {"role": "assistant", "tool_calls": [call]}]
    return {"messages": [*messages, {"role": "tool", "tool_call_id": MARKER, "content": MARKER}]}


CHATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pattern with many carets": schema(type="string", pattern=MARKER + "^" * 999),
    "pattern that ends in a backslash": schema(type="string", pattern=MARKER + "\\"),
    "pattern with an open bracket": schema(type="string", pattern=f"({MARKER}"),
    "pattern with a line break and a false record": schema(type="string", pattern=f"^\n(EngineCore pid=1) ERROR 11-29 {MARKER}\n^"),
    "pattern with a false crash": schema(type="string", pattern=f"^\nFatal Python error: {MARKER}\n{MARKER}Error: {MARKER}\n^"),
    "property": schema(type="object", properties={MARKER: {"type": "string", "pattern": "^^^"}}, required=[MARKER]),
    "wide repetition": schema(type="string", pattern=f"({MARKER}|\\w){{500}}"),
    "type that is none": schema(type=MARKER),
    "reference to nothing": schema(**{"$ref": f"#/definitions/{MARKER}"}),
    "large numbers": schema(type="integer", maximum=9223372036854775808, title=MARKER),
    "enumeration of a huge number": schema(enum=[10**30, MARKER]),
    "fraction as a bound": schema(type="integer", minimum=0.5, description=MARKER),
    "format that is none": schema(type="string", format=MARKER),
    "schema that is no schema": {"response_format": {"type": "json_schema", "json_schema": {"name": MARKER, "schema": [MARKER]}}},
    "format that is no object": {"response_format": MARKER},
    "tag": {"response_format": {"type": "structural_tag", "structures": [{"begin": MARKER, "schema": {"type": MARKER}, "end": MARKER}]}},
    "regex": {"structured_outputs": {"regex": f"({MARKER}"}},
    "grammar": {"structured_outputs": {"grammar": f"root ::= {MARKER}"}},
    "lark grammar": {"structured_outputs": {"grammar": f"start: {MARKER}"}},
    "tool with a pattern": tool(type="object", properties={MARKER: {"type": "string", "pattern": "^" * 99 + MARKER}}),
    "tool with a type that is none": tool(type=MARKER),
    "tool that does not exist": tool("other") | {"tool_choice": {"type": "function", "function": {"name": MARKER}}},
    "tool arguments that are no JSON": called(f'{{"{MARKER}'),
    "tool arguments that are no object": called(f'"{MARKER}"'),
    "long prompt": {"messages": [{"role": "user", "content": f"{MARKER} " * 2000}]},
    "role": {"messages": [{"role": MARKER, "content": MARKER}]},
    "part": {"messages": [{"role": "user", "content": [{"type": MARKER, "text": MARKER}]}]},
    "image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{MARKER}"}}]}]},
    "field": {MARKER: MARKER},
    "key of logit_bias": {"logit_bias": {MARKER: 1}},
    "token of logit_bias": {"logit_bias": {"999999": 1}, "user": MARKER},
    "stop": {"stop": [MARKER] * 50},
    "seed": {"seed": MARKER},
    "temperature": {"temperature": MARKER},
    "maximum": {"max_tokens": 10**9, "user": MARKER},
    "template": {"chat_template": f"{{% {MARKER} %}}"},
    "template that fails": {"chat_template": f"{{{{ raise_exception('{MARKER}') }}}}"},
    "template argument": {"chat_template_kwargs": {MARKER: MARKER}},
    "bad words": {"bad_words": [MARKER * 50]},
    "model": {"model": MARKER},
}


@dataclass
class Sealed:
    """An engine that serves tenants, in a folder of its own."""

    process: EngineProcess
    http: httpx.AsyncClient
    folder: Path

    def size(self) -> int:
        """Return the size of its log."""
        self.process.last_words()  # everything it has written is in the log then
        return sum(path.stat().st_size for path in self.folder.glob("engine.log*"))

    def files_with(self, text: str) -> list[str]:
        """Return those of the log and the files beside it that contain a text."""
        self.process.last_words()
        return [path.name for path in self.folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> AsyncIterator[Sealed]:
    """A sealed engine, started plainly."""
    spec = EngineSpec(
        module=Settings().engine_module,
        source=str(model_folder),
        name="base",
        dtype="float32",
        max_model_len=512,
        max_num_seqs=4,
        max_loras=2,
        max_lora_rank=16,
        max_cpu_loras=4,
        kv_cache_bytes=64 * 1024 * 1024,
    )
    folder = tmp_path_factory.mktemp("engine")
    async with running(spec, folder / "engine.log") as (process, http, _):
        process.seal_log()
        yield Sealed(process, http, folder)


async def test_a_start_is_logged_whole(engine: Sealed) -> None:
    text = engine.process.log_path.read_text()
    assert "EngineCore" in text
    assert "Started server process" in text  # uvicorn's line has no prefix
    assert "\x02" not in text


@pytest.mark.parametrize("kind", CHATS)
async def test_a_chat_leaves_no_text_of_the_tenant(engine: Sealed, kind: str) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": f"Say {MARKER}"}], "max_tokens": 4} | CHATS[kind]
    before = engine.size()
    response = await engine.http.post(CHAT, json=body, headers={"x-request-id": "req_0123456789abcdef01234567"})
    assert response.status_code < 600
    assert engine.files_with(MARKER) == []
    assert engine.size() - before < MAX_GROWTH


@pytest.mark.parametrize(
    ("path", "content"),
    [
        (COMPLETION, json.dumps({"model": "base", "prompt": MARKER * 5000, "max_tokens": 1})),
        (COMPLETION, json.dumps({"model": "base", "prompt": [MARKER, 5], "max_tokens": 1})),
        (COMPLETION, json.dumps({"model": "base", "prompt": [10**9], "max_tokens": 1, "user": MARKER})),
        (COMPLETION, json.dumps({"model": "base", "prompt": MARKER, "logprobs": 10**6})),
        (CHAT, f'{{"model": "base", "messages": {MARKER}'),
        (CHAT, f'{{"model": "base", "messages": "\\ud800{MARKER}"}}'),
        (f"/{MARKER}", "{}"),
        (f"/v1/chat/completions?{MARKER}", MARKER),
        ("/v1/load_lora_adapter", json.dumps({"lora_name": "ten_0123456789abcdef0123-" + "0" * 64, "lora_path": f"/{MARKER}"})),
        ("/v1/messages", json.dumps({"model": "base", "max_tokens": 4, "messages": [{"role": "user", "content": {MARKER: MARKER}}]})),
        ("/tokenize", json.dumps({"model": "base", "prompt": {MARKER: MARKER}})),
    ],
)
async def test_another_request_leaves_no_text_of_the_tenant(engine: Sealed, path: str, content: str) -> None:
    before = engine.size()
    headers = {"content-type": "application/json", "x-request-id": "req_0123456789abcdef01234567"}
    response = await engine.http.post(path, content=content, headers=headers)
    assert response.status_code >= 400
    assert engine.files_with(MARKER) == []
    assert engine.size() - before < MAX_GROWTH


async def test_a_flood_of_bad_patterns_does_not_grow_the_log(engine: Sealed) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    before = engine.size()
    for length in range(800, 830):
        await engine.http.post(CHAT, json=body | schema(type="string", pattern="^" * length + MARKER))
    assert engine.size() - before < 30 * MAX_GROWTH / 4
    assert engine.files_with(MARKER) == []


async def test_the_crash_of_a_sealed_engine_says_why(engine: Sealed) -> None:
    server = psutil.Process(engine.process.pid)
    core = next(one for one in server.children(recursive=True) if "EngineCore" in " ".join(one.cmdline()))
    os.kill(core.pid, signal.SIGKILL)
    await until(lambda: not engine.process.running, timeout_s=120)
    assert "EngineDead" in engine.process.last_words() or "EngineCore" in engine.process.last_words(), engine.process.last_words()
