"""An example of each operation, for curl and for Python. Its values are made from the schemas, so that they are valid."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmaas.reference.fields import Schema, name_of

_QUESTION = "What is the capital of France?"
_CHAT = [{"role": "user", "content": _QUESTION}]
#: Values by the names of fields and of parameters of paths. Other fields get the simplest value of their type.
VALUES: Mapping[str, Any] = {
    "model": "smollm2-135m-instruct",
    "base_model": "smollm2-135m-instruct",
    "messages": _CHAT,
    "prompt": _QUESTION,
    "input": _QUESTION,
    "query": _QUESTION,
    "documents": ["Paris is the capital of France.", "Rome is the capital of Italy."],
    "text_1": _QUESTION,
    "text_2": "Paris is the capital of France.",
    "tokens": [1, 2, 3],
    "max_tokens": 100,
    "items": [{"type": "message", "role": "user", "content": _QUESTION}],
    "metadata": {"topic": "geography"},
    "name": "support-bot",
    "source": "/models/smollm2-135m-instruct",
    "version": 1,
    "tenant": "acme",
    "params": {"model": "smollm2-135m-instruct", "max_tokens": 100, "messages": _CHAT},
    "custom_id": "question-1",
    "requests_per_minute": 60,
    "input_file_id": "file-0123456789abcdef",
    "purpose": "batch",
    "file": "requests.jsonl",
    "adapter_config": "adapter_config.json",
    "adapter_model": "adapter_model.safetensors",
    "url": "https://example.com/lmaas",
}
#: Values of single operations, where the name of a field means something else.
OF_OPERATIONS: Mapping[str, Mapping[str, Any]] = {
    "create_tenant": {"name": "acme"},
    "create_key": {"name": "nightly jobs"},
    "create_operator_key": {"name": "on-call"},
    "create_base_model": {"name": "smollm2-135m-instruct"},
    "create_message_batch": {"requests": [{"custom_id": VALUES["custom_id"], "params": VALUES["params"]}]},
}
#: Operations that generate an answer may wait for an engine to start.
_PATIENT_S = 120

_PARAMETER = re.compile(r"{(\w+)}")


@dataclass(frozen=True, slots=True)
class Example:
    """One request. `body` is its JSON, or the fields of its form, of which `files` are the names of files."""

    method: str
    path: str
    body: dict[str, Any] | None
    files: frozenset[str]
    is_form: bool
    needs_key: bool
    is_json: bool
    may_wait: bool

    @property
    def curl(self) -> str:
        """The request as a command."""
        words = [f'curl "$SERVER{self.path}"']
        if self.method not in ("GET", "POST") or (self.method == "POST" and self.body is None):
            words[0] = f"curl -X {self.method} " + words[0].removeprefix("curl ")
        if self.needs_key:
            words.append('-H "Authorization: Bearer $KEY"')
        if self.is_form:
            fields = (self.body or {}).items()
            words += [f"-F {shlex.quote(f'{name}=@{value}' if name in self.files else f'{name}={value}')}" for name, value in fields]
        elif self.body is not None:
            words += ['-H "Content-Type: application/json"', f"-d {shlex.quote(json.dumps(self.body, indent=2))}"]
        return " \\\n  ".join(words)

    @property
    def python(self) -> str:
        """The request as a program."""
        arguments = ['os.environ["SERVER"] + ' + json.dumps(self.path)]
        if self.needs_key:
            arguments.append('headers={"Authorization": "Bearer " + os.environ["KEY"]}')
        if self.is_form:
            given = self.body or {}
            arguments.append(f"data={_code({name: value for name, value in given.items() if name not in self.files})}")
            opened = ", ".join(f'{_code(name)}: open({_code(value)}, "rb")' for name, value in given.items() if name in self.files)
            arguments.append(f"files={{{opened}}}")
        elif self.body is not None:
            arguments.append(f"json={_code(self.body)}")
        if self.may_wait:
            arguments.append(f"timeout={_PATIENT_S}")
        inner = "".join(f"    {argument},\n" for argument in arguments)
        shown = "answer.json()" if self.is_json else "answer.text"
        call = f"answer = httpx.{self.method.lower()}(\n{inner})\nanswer.raise_for_status()\nprint({shown})\n"
        return f"import os\n\nimport httpx\n\n{call}"


def example(method: str, path: str, operation: Schema, schemas: Mapping[str, Schema]) -> Example:
    """Return the example of an operation of the OpenAPI document."""
    filled = _PARAMETER.sub(lambda found: str(VALUES.get(found[1], f"{found[1]}-id")), path)
    content = operation.get("requestBody", {}).get("content", {})
    [(media, described)] = content.items() or [("", {})]
    schema = _resolved(described.get("schema", {}), schemas)
    own = OF_OPERATIONS.get(operation["operationId"], {})
    files = frozenset(name for name, value in schema.get("properties", {}).items() if "contentMediaType" in value)
    answers = {kind for status, answer in operation["responses"].items() if status.startswith("2") for kind in answer.get("content", {})}
    return Example(
        method,
        filled,
        _sample(schema, schemas, {**VALUES, **own}) if media else None,
        files,
        is_form=media.startswith("multipart/"),
        needs_key=operation.get("security") != [],
        is_json="application/json" in answers,
        may_wait="x-permission" not in operation and method == "POST",
    )


def _resolved(schema: Schema, schemas: Mapping[str, Schema]) -> Schema:
    name = name_of(schema)
    return schema if name is None else schemas[name]


def _sample(schema: Schema, schemas: Mapping[str, Schema], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object with the required fields; with one of the others if none is required."""
    properties = schema.get("properties", {})
    names = list(schema.get("required", ()))
    if not names or names == ["model"]:
        # A request that contains only its model has no effect, and a change without a field is refused.
        known = [name for name in ("input", "prompt", "name", *properties) if name in properties and name in values and name not in names]
        names += known[:1] or list(properties)[:1]
    return {name: _value(name, properties[name], schemas, values) for name in names}


def _value(name: str, schema: Schema, schemas: Mapping[str, Schema], values: Mapping[str, Any]) -> Any:
    """Return a value for a field."""
    schema = _resolved(schema, schemas)
    options = [schema["const"]] if "const" in schema else schema.get("enum", [])
    if options:
        return values[name] if values.get(name) in options else options[0]
    if name in values:
        return values[name]
    if "anyOf" in schema:
        return _value(name, schema["anyOf"][0], schemas, values)
    return _simplest(name, schema, schemas, values)


def _simplest(name: str, schema: Schema, schemas: Mapping[str, Schema], values: Mapping[str, Any]) -> Any:
    """Return the simplest value of the schema's type."""
    kind = schema.get("type", "string")
    kind = kind if isinstance(kind, str) else kind[0]
    if kind == "array":
        return [_value(name, schema["items"], schemas, values)] if schema.get("items") else []
    if kind == "object":
        return _sample(schema, schemas, values) if "properties" in schema else {}
    least = schema.get("minimum", 1)
    return {"integer": least, "number": least, "boolean": True}.get(kind, "text")


def _code(value: Any, indent: int = 1) -> str:
    """Return a JSON value as Python code, with a line for each item of an object or of a list of objects."""
    inner, outer = "    " * (indent + 1), "    " * indent
    if isinstance(value, dict) and value:
        lines = "".join(f"{inner}{_code(name)}: {_code(item, indent + 1)},\n" for name, item in value.items())
        return f"{{\n{lines}{outer}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        lines = "".join(f"{inner}{_code(item, indent + 1)},\n" for item in value)
        return f"[\n{lines}{outer}]"
    if isinstance(value, list):
        return f"[{', '.join(_code(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
