"""Verdicts of the real compiler, with vLLM's own validation and the base model's own tokenizer."""

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmaas.engine.grammars.client import Checkers
from lmaas.engine.grammars.prompts import CHAT
from lmaas.engine.grammars.verdict import INVALID, TOO_COMPLEX, Question
from lmaas.engine.launch import VLLM, EngineSpec
from tests.support.conditions import until

COMPLETION = "/v1/completions"
Place = tuple[Checkers, EngineSpec]


def schema(value: Any) -> dict[str, Any]:
    """Return the parameters of a request whose output follows this schema."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


def tools(value: Any, choice: Any = "auto", **more: Any) -> dict[str, Any]:
    """Return the parameters of a request with a tool whose parameters follow this schema."""
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": value, **more}}], "tool_choice": choice}


def string(pattern: str) -> dict[str, Any]:
    """Return a schema for strings."""
    return schema({"type": "string", "pattern": pattern})


@pytest.fixture(scope="module")
async def place(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    """The checkers of this machine, and an engine to check for. The first check starts a process."""
    spec = EngineSpec(VLLM, str(model_folder), "m", "auto", 2048, 16, 8, 16, 64, 2**28)
    async with Checkers(tmp_path_factory.mktemp("grammars"), None).kept() as checkers:
        yield checkers, spec


OBJECT = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


@pytest.mark.parametrize(
    "parameters",
    [
        schema(OBJECT),
        schema({"type": "object", "if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}}),
        schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}),
        schema({"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}),
        schema({"enum": [f"value{number}" for number in range(1000)]}),
        string(r"^\d{4}-\d{2}-\d{2}$"),
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"structured_outputs": {"regex": r"\d+"}},
        {"structured_outputs": {"grammar": 'root ::= "a" | "b"'}},
        tools(OBJECT),
        tools(OBJECT, strict=True),
        tools(OBJECT, "required"),
        tools(OBJECT, {"type": "function", "function": {"name": "f"}}),
        tools({"type": "integer", "multipleOf": 3}),  # of no effect: the model chooses freely
    ],
)
async def test_what_people_use_passes(place: Place, parameters: dict[str, Any]) -> None:
    checkers, spec = place
    verdict = await checkers.check(spec, Question(CHAT, parameters))
    assert verdict.code == "", verdict
    if "tools" not in parameters:
        assert (await checkers.check(spec, Question(COMPLETION, parameters))).code == ""


@pytest.mark.parametrize(
    ("parameters", "param", "word"),
    [
        (string(r"^\p{L}{1,5}$"), "response_format", "Unicode"),
        (string("\\"), "response_format", "Escape"),
        (string(r"\w{500}"), "response_format", "cannot compile"),
        (string("("), "response_format", ""),
        (schema({"type": "integer", "multipleOf": 2147483648}), "response_format", "'multipleOf' (at '/')"),
        (schema({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}), "response_format", "'uniqueItems'"),
        (schema({"type": "string", "pattern": "a", "maxLength": 5}), "response_format", "'maxLength'"),
        (schema({"type": "string", "format": "idn-email"}), "response_format", "'idn-email'"),
        (schema({"allOf": [OBJECT, OBJECT]}), "response_format", "'allOf'"),
        (schema({"type": "integer", "maximum": 9223372036854775808}), "response_format", "Integer"),
        (schema({"type": "integer", "minimum": 0.5}), "response_format", "whole number"),
        (schema({"enum": [10**30]}), "response_format", "2**64"),
        (schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}), "response_format", "no answer"),
        (schema({"anyOf": []}), "response_format", "empty"),
        (schema({"type": "nothing"}), "response_format", ""),
        ({"structured_outputs": {"grammar": "root ::= "}}, "structured_outputs", "EBNF"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", ""),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", ""),
        (tools({"type": "integer", "maximum": 2**70}, "required", strict=True), "tools", "Integer"),
        (tools({"type": "string", "pattern": "("}, strict=True), "tools", ""),
        (tools(OBJECT, strict=True) | string("("), "response_format", ""),
    ],
)
async def test_what_no_engine_could_compile_is_named(place: Place, parameters: dict[str, Any], param: str, word: str) -> None:
    checkers, spec = place
    verdict = await checkers.check(spec, Question(CHAT, parameters))
    assert (verdict.code, verdict.param) == (INVALID, param), verdict
    assert word in verdict.message
    assert not any(text in verdict.message for text in ("/project/", "Check failed", "pydantic", "vllm"))


@pytest.mark.parametrize(
    "parameters",
    [
        schema({"type": "string", "maxLength": 5_000_000}),
        string("a" * 99_990 + "{1,900}"),
        string("([a-z]{1,400}){400}"),
        tools({"type": "string", "maxLength": 5_000_000}, "required", strict=True),
    ],
)
async def test_what_explodes_is_refused(place: Place, parameters: dict[str, Any]) -> None:
    checkers, spec = place
    verdict = await checkers.check(spec, Question(CHAT, parameters))
    assert verdict.code in (TOO_COMPLEX, INVALID), verdict
    assert verdict.cpu_s < 10
    assert (await checkers.check(spec, Question(CHAT, schema({"type": "boolean"})))).code == ""


async def test_a_checker_that_was_killed_is_started_again(place: Place) -> None:
    checkers, spec = place
    await checkers.check(spec, Question(CHAT, schema(OBJECT)))
    first = await until_named(None)
    os.kill(first, signal.SIGKILL)
    await until(lambda: not psutil.pid_exists(first) or psutil.Process(first).status() == psutil.STATUS_ZOMBIE)
    assert (await checkers.check(spec, Question(CHAT, schema(OBJECT)))).code == ""
    assert await until_named(first) != first


async def until_named(other_than: int | None) -> int:
    """Wait until another process has a checker's name, and return its id."""
    found: list[int] = []

    def named() -> bool:
        found[:] = [
            child.pid
            for child in psutil.Process().children(recursive=True)
            if child.pid != other_than and child.status() != psutil.STATUS_ZOMBIE and "checks grammars of m" in " ".join(child.cmdline())
        ]
        return bool(found)

    await until(named)
    return found[0]
