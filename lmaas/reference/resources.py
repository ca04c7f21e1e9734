"""The operations of the OpenAPI document, by resource: what the pages show, without HTML."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lmaas.reference.examples import Example, example
from lmaas.reference.fields import Field, Schema, field_of, fields_of, name_of, references

#: The resources with a title of their own, in their order. Others follow with their names.
TITLES = {
    "chat": "Chat completions",
    "completions": "Completions",
    "responses": "Responses",
    "conversations": "Conversations",
    "messages": "Messages",
    "embeddings": "Embeddings, rankings and scores",
    "tokens": "Tokens",
    "models": "Models",
    "adapters": "Adapters",
    "files": "Files",
    "batches": "Batches",
    "message-batches": "Message batches",
    "keys": "API keys",
    "sessions": "Sessions",
    "webhooks": "Webhooks",
    "usage": "Usage and costs",
    "tenants": "Tenants",
    "base-models": "Base models",
    "replicas": "Replicas",
    "health": "Health and metrics",
}
#: Parts of paths that belong to a resource of another name.
_SAME = {
    "rerank": "embeddings",
    "score": "embeddings",
    "tokenize": "tokens",
    "detokenize": "tokens",
    "check-adapter": "adapters",
    "cogs": "usage",
    "healthz": "health",
    "readyz": "health",
    "metrics": "health",
    "openapi.json": "health",
}
#: The end of the id of an operation on a tenant's resources, at its path for operators.
_OF_TENANT = "_of_tenant"


@dataclass(frozen=True, slots=True)
class Answer:
    """One status of an operation, with the media type and the name of the object that its body is, if there is one."""

    status: str
    text: str
    media: str
    object: str | None


@dataclass(frozen=True, slots=True)
class Call:
    """An operation. `operator_path` is where operators call an operation on a tenant's resources."""

    id: str
    method: str
    path: str
    operator_path: str | None
    summary: str
    description: str
    parameters: tuple[Field, ...]
    body_media: str
    body_text: str
    body: tuple[Field, ...]
    answers: tuple[Answer, ...]
    errors: tuple[Answer, ...]
    example: Example


@dataclass(frozen=True, slots=True)
class Object:
    """A schema that the operations of a resource mention."""

    name: str
    text: str
    fields: tuple[Field, ...]


@dataclass(frozen=True, slots=True)
class Resource:
    """The operations on one kind of thing, and the objects that they mention."""

    slug: str
    title: str
    calls: tuple[Call, ...]
    objects: tuple[Object, ...]


def resources(spec: Mapping[str, Any]) -> list[Resource]:
    """Return the resources of an OpenAPI document, in the order of the navigation."""
    schemas: Mapping[str, Schema] = spec["components"]["schemas"]
    listed = [(path, method.upper(), operation) for path, item in spec["paths"].items() for method, operation in item.items()]
    paths = {operation["operationId"]: path for path, _, operation in listed}
    calls: dict[str, list[Call]] = {slug: [] for slug in TITLES}
    mentioned: dict[str, list[str]] = {}
    for path, method, operation in listed:
        own = operation["operationId"].removesuffix(_OF_TENANT)
        if own != operation["operationId"] and own in paths:
            continue
        slug = slug_of(path)
        calls.setdefault(slug, []).append(_call(path, method, operation, paths.get(own + _OF_TENANT), schemas))
        mentioned.setdefault(slug, []).extend(_objects_of(operation, schemas))
    return [
        Resource(slug, TITLES.get(slug, slug.replace("-", " ").capitalize()), tuple(found), _objects(mentioned[slug], schemas))
        for slug, found in calls.items()
        if found
    ]


def slug_of(path: str) -> str:
    """Return the name of the resource of a path."""
    parts = path.removeprefix("/admin").removeprefix("/v1").strip("/").split("/")
    if parts[:2] == ["tenants", "{tenant}"] and len(parts) > 2:
        parts = parts[2:]
    if parts[:2] == ["messages", "batches"]:
        return "message-batches"
    return _SAME.get(parts[0], parts[0])


def _call(path: str, method: str, operation: Schema, operator_path: str | None, schemas: Mapping[str, Schema]) -> Call:
    parameters = [
        field_of(
            f"{item['name']} ({item['in']})",
            item["schema"],
            schemas,
            required=item.get("required", False),
            text=item.get("description", ""),
        )
        for item in operation.get("parameters", ())
    ]
    [(media, described)] = operation.get("requestBody", {}).get("content", {}).items() or [("", {})]
    name = name_of(described.get("schema", {}))
    body = schemas[name] if name is not None else described.get("schema", {})
    answers = [answer for status, found in operation["responses"].items() for answer in _answers(status, found)]
    return Call(
        operation["operationId"],
        method,
        path,
        operator_path,
        operation["summary"],
        operation.get("description", ""),
        tuple(parameters),
        media,
        " ".join(body.get("description", "").split()),
        tuple(fields_of(body, schemas)),
        tuple(answer for answer in answers if answer.status.startswith("2")),
        tuple(answer for answer in answers if not answer.status.startswith("2")),
        example(method, path, operation, schemas),
    )


def _answers(status: str, response: Schema) -> Iterable[Answer]:
    content = response.get("content") or {"": {}}
    for media, described in content.items():
        schema = described.get("schema", {})
        name = name_of(schema)
        stream = schema.get("description", "") if media == "text/event-stream" else ""
        text = stream or response["description"]
        yield Answer("other" if status == "default" else status, text, media, name or name_of(schema.get("contentSchema", {})))


def _objects_of(operation: Schema, schemas: Mapping[str, Schema]) -> Iterable[str]:
    """Yield the names of the objects that an operation mentions. The fields of its own body are shown with the operation."""
    for described in operation.get("requestBody", {}).get("content", {}).values():
        name = name_of(described.get("schema", {}))
        yield from references(described if name is None else schemas[name])
    yield from references(operation["responses"])


def _objects(names: Iterable[str], schemas: Mapping[str, Schema]) -> tuple[Object, ...]:
    """Return the objects of these names and all that they mention, but not lists of values, which are shown where they are used."""
    found: dict[str, Object] = {}
    waiting = [name for name in names if name in schemas]
    while waiting:
        name = waiting.pop(0)
        if name not in found and "enum" not in schemas[name]:
            schema = schemas[name]
            found[name] = Object(name, " ".join(schema.get("description", "").split()), tuple(fields_of(schema, schemas)))
            waiting += references(schema)
    return tuple(found.values())
