"""The OpenAPI document of the whole HTTP surface, served at `/openapi.json`. The part of the management API follows from its table."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from lmaas.api.operation import Permission, Place
from lmaas.api.shapes.common import Shape
from lmaas.api.table import OPERATIONS, PLACES

Schema = dict[str, Any]

#: The paths of Anthropic's clients, whose errors have another shape. The protocol describes it.
_ANTHROPIC = "/v1/messages/"
_REF = "#/components/schemas/{name}"
_GENERIC = re.compile(r"Page_(\w+)_")
_CALLERS = {
    Permission.OPERATOR: "an operator's key",
    Permission.TENANT_ADMIN: "a key of the role tenant_admin",
    Permission.TENANT: "any key of the tenant",
}

#: A request needs one of them.
SECURITY_SCHEMES: dict[str, Schema] = {
    "key": {"type": "http", "scheme": "bearer"},
    "azure_key": {"type": "apiKey", "in": "header", "name": "api-key"},
    "anthropic_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
HEADERS: dict[str, Schema] = {
    "RequestId": {"description": "The id of the request.", "required": True, "schema": {"type": "string"}},
    "ProcessingMs": {
        "description": "Milliseconds from the end of the request's headers to the response's headers.",
        "required": True,
        "schema": {"type": "integer", "minimum": 0},
    },
    "ShouldRetry": {
        "description": "Whether the same request may succeed later.",
        "required": True,
        "schema": {"enum": ["true", "false"]},
    },
    "RetryAfter": {"description": "Seconds after which a retry is of use.", "schema": {"type": "integer", "minimum": 1}},
}


class ErrorBody(Shape, frozen=True, kw_only=True):
    """An error. `code` is for programs, `param` names the wrong field of the request."""

    message: str
    type: str
    param: str | None
    code: str


class Error(Shape, frozen=True, kw_only=True):
    """The body of every response that is an error."""

    error: ErrorBody


def ref(name: str) -> Schema:
    """Return a reference to a schema of the document."""
    return {"$ref": _REF.format(name=name)}


def headers(*more: str) -> Schema:
    """Return the headers of every response, and the named ones."""
    names = {"x-request-id": "RequestId", "openai-processing-ms": "ProcessingMs"} | {name: _HEADER_NAMES[name] for name in more}
    return {name: {"$ref": f"#/components/headers/{component}"} for name, component in names.items()}


_HEADER_NAMES = {"x-should-retry": "ShouldRetry", "retry-after": "RetryAfter"}


def error_response(description: str) -> Schema:
    """Return the description of a response that is an error."""
    return {
        "description": description,
        "headers": headers("x-should-retry", "retry-after"),
        "content": {"application/json": {"schema": ref("Error")}},
    }


def document(paths: Mapping[str, Any] | None = None, schemas: Mapping[str, Schema] | None = None) -> dict[str, Any]:
    """Return the document: the management API, and the `paths` and `schemas` of other endpoints."""
    types = [kind for operation in OPERATIONS for kind in (operation.answer, operation.body, operation.query) if kind is not None]
    found = _schemas([Error, *types])
    queries = {operation.query.__name__: operation.query for operation in OPERATIONS if operation.query is not None}
    parameters = {name: found.pop(name)["properties"] for name in queries}
    described: dict[str, dict[str, Any]] = {}
    for place in PLACES:
        described.setdefault(place.path, {})[place.operation.method.lower()] = _operation(place, parameters)
    return {
        "openapi": "3.1.0",
        "info": {"title": "lmaas", "version": "1", "description": "Serverless, multi-tenant LLM endpoints."},
        "security": [{name: []} for name in SECURITY_SCHEMES],
        "paths": dict(paths or {}) | described,
        "components": {"schemas": found | dict(schemas or {}), "headers": HEADERS, "securitySchemes": SECURITY_SCHEMES},
    }


def _schemas(types: Iterable[type]) -> dict[str, Schema]:
    """Return the schemas of these types and of those that they refer to, by name."""
    _, found = msgspec.json.schema_components(dict.fromkeys(types), ref_template=_REF)
    return {_plain_name(name): _tidied(schema) for name, schema in found.items()}


def _plain_name(name: str) -> str:
    """Return `TenantPage` for msgspec's `Page_Tenant_`."""
    return _GENERIC.sub(r"\1Page", name)


def _tidied(value: Any) -> Any:
    if isinstance(value, dict):
        # A title only repeats the name. The files of a form are sent as they are, not in base64, msgspec's encoding of bytes in JSON.
        dropped = {"title"} if isinstance(value.get("title"), str) else set()
        dropped |= {"contentEncoding"} if "contentMediaType" in value else set()
        return {key: _tidied(item) for key, item in value.items() if key not in dropped}
    if isinstance(value, list):
        return [_tidied(item) for item in value]
    return _plain_name(value) if isinstance(value, str) and value.startswith(_REF.format(name="")) else value


def _operation(place: Place, parameters: Mapping[str, Schema]) -> dict[str, Any]:
    operation = place.operation
    described: dict[str, Any] = {
        "operationId": place.id,
        "summary": operation.summary,
        "description": f"Needs {_CALLERS[place.permission]}.",
        "tags": ["operators" if place.permission is Permission.OPERATOR else "tenants"],
        "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in place.parameters],
        "responses": _responses(place),
        "x-permission": place.permission.value,
    }
    if operation.query is not None:
        described["parameters"] += [
            {"name": name, "in": "query", "required": False, "schema": schema}
            for name, schema in parameters[operation.query.__name__].items()
        ]
    if operation.body is not None:
        media = "multipart/form-data" if operation.files else "application/json"
        described["requestBody"] = {"required": True, "content": {media: {"schema": ref(_plain_name(_name(operation.body)))}}}
    if operation.audit is not None:
        described["x-audit-action"] = operation.audit.value
        described["description"] += f" The audit log records `{operation.audit.value}`."
    return described


def _name(kind: Any) -> str:
    [name] = msgspec.json.schema(kind)["$ref"].split("/")[-1:]
    return str(name)


def _responses(place: Place) -> dict[str, Any]:
    operation = place.operation
    content: Schema = {operation.media: {} if operation.answer is None else {"schema": ref(_plain_name(_name(operation.answer)))}}
    if operation.csv:
        content["text/csv"] = {"schema": {"type": "string", "description": "The whole report, a row for each line."}}
    if operation.events:
        content["text/event-stream"] = {"schema": {"type": "string", "description": operation.events}}
    done = {operation.status: "Created." if operation.status == 201 else "Done."} | dict(operation.also)
    responses: dict[str, Any] = {
        str(status): {"description": words, "headers": headers(), "content": content} for status, words in sorted(done.items())
    }
    failed = {status: error_response(words) for status, words in _errors(place).items()}
    if place.path.startswith(_ANTHROPIC):
        for response in failed.values():
            response["content"] = {"application/json": {"schema": ref("MessageError")}}
    return responses | failed


def _errors(place: Place) -> dict[str, str]:
    """Return the statuses of the errors that the operation may have, and what they mean."""
    operation = place.operation
    possible = {
        "400": (
            operation.body is not None or operation.query is not None,
            "The request is malformed, or a value is not allowed. `param` names the field.",
        ),
        "401": (True, "The API key is missing or not valid (`invalid_api_key`)."),
        "403": (True, "The role of the key does not allow this (`insufficient_permissions`)."),
        "404": (bool(place.parameters), "What the path names does not exist, or belongs to another tenant."),
        "409": (operation.audit is not None, "The present state does not allow the change: for example, the name is taken."),
        "413": (operation.body is not None, "The body is too large, or a quota is used up."),
        "503": (True, "A part of the service, such as Postgres or the object store, cannot be reached. Retry later."),
    }
    # Anthropic's clients know other statuses.
    names = {"503": "529"} if place.path.startswith(_ANTHROPIC) else {}
    return {names.get(status, status): words for status, (does, words) in possible.items() if does} | {"default": "Another error."}
