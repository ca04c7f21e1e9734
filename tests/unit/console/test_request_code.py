"""The code that the playground offers for copying: valid in each language, whatever the message is."""

import ast
import json
import re
import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmaas.console.request_code import Asked, code_for, request_body

ORIGIN = "https://lmaas.example"
HOSTILE = [
    "Hi",
    'it\'s "quoted" and `ticked` $HOME $(rm -rf /) !! \\ \\n',
    "two\nlines\r\n\ttab",
    "</script><script>alert(1)</script>",
    "ünïcödé 😀 \u2028 \u2029",
    "${x} #{y} {{z}} %s",
    "'''\n\"\"\"",
]


def code(asked: Asked) -> dict[str, str]:
    return dict(code_for(asked, ORIGIN))


def of_curl(text: str) -> dict[str, Any]:
    """Return the body that a shell would pass to curl."""
    # A shell joins lines that end with a backslash.
    words = shlex.split(text.replace(" \\\n  --", " --", 3))
    assert words[:3] == ["curl", "--no-buffer", f"{ORIGIN}/v1/chat/completions"]
    assert words[3:7] == ["--header", "authorization: Bearer $LMAAS_API_KEY", "--header", "content-type: application/json"]
    body: dict[str, Any] = json.loads(words[8])
    return body


def of_python(text: str) -> dict[str, Any]:
    """Return the arguments of the call in the Python code."""
    calls = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("completions.create")
    ]
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in calls[0].keywords}


def of_javascript(text: str) -> dict[str, Any]:
    """Return the argument of the call in the JavaScript code, which is written in JSON."""
    found = re.search(r"completions\.create\((\{.*?\n\})\);\n", text, re.DOTALL)
    assert found is not None
    body: dict[str, Any] = json.loads(found[1])
    return body


@pytest.mark.parametrize("message", HOSTILE)
def test_every_language_sends_the_request_of_the_form(message: str) -> None:
    asked = Asked("robot@2", message, system=message, max_tokens=5, temperature=0.5)
    expected = request_body(asked) | {"stream": True}
    shown = code(asked)
    assert of_curl(shown["curl"]) == of_python(shown["Python"]) == of_javascript(shown["JavaScript"]) == expected
    assert "</script>" not in shown["JavaScript"]
    assert ORIGIN in shown["Python"]
    assert ORIGIN in shown["JavaScript"]


@given(st.text(), st.text())
def test_no_text_breaks_the_code(model: str, message: str) -> None:
    asked = Asked(model, message)
    shown = code(asked)
    assert of_python(shown["Python"])["messages"] == request_body(asked)["messages"]
    assert of_javascript(shown["JavaScript"])["messages"] == request_body(asked)["messages"]
    if "\0" not in message + model:
        assert of_curl(shown["curl"])["messages"] == request_body(asked)["messages"]


def test_what_is_not_given_is_not_sent() -> None:
    assert request_body(Asked("base", "Hi")) == {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
    assert request_body(Asked("base", "Hi", temperature=0.0))["temperature"] == 0.0
