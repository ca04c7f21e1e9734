"""Compares responses with the OpenAPI document. The clients of the tests call it for everything that they receive."""

import functools
import re
from typing import Any

import httpx
import jsonschema

from lmaas.app import openapi_document

SPEC = openapi_document()
_TEMPLATES = {path: re.compile(re.sub(r"{\w+}", "[^/]+", path)) for path in SPEC["paths"]}


def described(method: str, path: str) -> str | None:
    """Return the path of the document that an address belongs to, or None if the document has no such operation."""
    plain = re.sub("/+", "/", path).rstrip("/")
    # A path without parameters goes before one with some.
    matching = sorted((template for template, pattern in _TEMPLATES.items() if pattern.fullmatch(plain)), key=lambda found: "{" in found)
    return next((template for template in matching if method.lower() in SPEC["paths"][template]), None)


@functools.cache
def _validator(method: str, template: str | None, status: int) -> jsonschema.Draft202012Validator:
    schema: dict[str, Any] = {"$ref": "#/components/schemas/Error"}
    if template is not None:
        responses = SPEC["paths"][template][method.lower()]["responses"]
        assert str(status) in responses or (status >= 400 and "default" in responses), f"{method} {template} does not describe {status}"
        schema = (responses.get(str(status)) or responses["default"])["content"]["application/json"]["schema"]
    return jsonschema.Draft202012Validator(schema | {"components": SPEC["components"]}, format_checker=jsonschema.FormatChecker())


def check_body(method: str, path: str, status: int, body: Any) -> None:
    """Fail unless the JSON of a response is as the document describes it."""
    template = described(method, path)
    if template is None and status < 400:
        return
    errors = list(_validator(method, template, status).iter_errors(body))
    assert not errors, f"{method} {path} → {status}: {errors[0].message} at {errors[0].json_path}"


async def check_response(response: httpx.Response) -> None:
    """Fail unless a JSON response is as the document describes it."""
    method, path = response.request.method, response.request.url.path
    is_json = response.headers.get("content-type", "").startswith("application/json")
    if not is_json or method in ("HEAD", "OPTIONS") or (described(method, path) is None and response.status_code < 400):
        return
    await response.aread()
    check_body(method, path, response.status_code, response.json())
    assert response.headers["x-request-id"]


#: For `event_hooks` of a client.
CHECKED = {"response": [check_response]}
