"""The models that a tenant may call, in OpenAI's and in Anthropic's shape, and their part of the OpenAPI document."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from lmaas.errors import InvalidRequest
from lmaas.inference.catalog import ListedModel
from lmaas.protocols.openapi import ERRORS
from lmaas.protocols.openapi_parts import COUNT, TEXT, Schema, closed
from lmaas.protocols.parameters.checks import out_of_range
from lmaas.states import PoolKind

#: The size of a page of Anthropic's list, and its maximum.
PAGE, MAX_PAGE = 20, 1000


def with_adapters(query: Mapping[str, str]) -> bool:
    """Return whether a list has adapters besides base models. Raises InvalidRequest for a value that is neither true nor false."""
    given = query.get("adapters", "true")
    if given not in ("true", "false"):
        raise out_of_range("adapters", "true or false")
    return given == "true"


def openai_model(model: ListedModel) -> dict[str, Any]:
    """Return OpenAI's object of a model, with vLLM's `parent` and `max_model_len`, and its kind."""
    owner = "lmaas" if model.parent is None else "tenant"
    shown = {"id": model.name, "object": "model", "created": model.created, "owned_by": owner, "parent": model.parent}
    return shown | {"max_model_len": model.max_model_len, "kind": model.kind}


def openai_models(models: Sequence[ListedModel]) -> dict[str, Any]:
    """Return OpenAI's list of models, which has no pages."""
    return {"object": "list", "data": [openai_model(model) for model in models]}


def anthropic_model(model: ListedModel) -> dict[str, Any]:
    """Return Anthropic's object of a model, and its kind."""
    created = datetime.fromtimestamp(model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    shown = {"type": "model", "id": model.name, "display_name": model.name, "created_at": created, "lifecycle": "active"}
    return shown | {"max_input_tokens": model.max_model_len, "max_tokens": model.max_model_len, "kind": model.kind}


def anthropic_models(models: Sequence[ListedModel], query: Mapping[str, str]) -> dict[str, Any]:
    """Return a page of Anthropic's list of models. `query` may have `limit`, and one of `before_id` and `after_id`.

    Raises InvalidRequest for another limit than 1 to MAX_PAGE, and for an id that is not in the list.
    """
    limit = _limit(query.get("limit", ""))
    before, after = query.get("before_id"), query.get("after_id")
    if before and after:
        raise InvalidRequest("'before_id' and 'after_id' cannot be used together. Send one of them.", param="before_id")
    if before:
        rest = models[: _place(models, before, "before_id")]
        page = rest[-limit:]
    else:
        rest = models[_place(models, after, "after_id") + 1 :] if after else models
        page = rest[:limit]
    return {
        "data": [anthropic_model(model) for model in page],
        "has_more": len(rest) > limit,
        "first_id": page[0].name if page else None,
        "last_id": page[-1].name if page else None,
    }


def _limit(text: str) -> int:
    if not text:
        return PAGE
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_PAGE)) and 1 <= int(text) <= MAX_PAGE):
        raise out_of_range("limit", f"between 1 and {MAX_PAGE}")
    return int(text)


def _place(models: Sequence[ListedModel], name: str, param: str) -> int:
    for place, model in enumerate(models):
        if model.name == name:
            return place
    raise InvalidRequest(f"'{param}' is '{name[:100]}', which is not in the list of models.", param=param)


_KIND: Schema = {"enum": [kind.value for kind in PoolKind], "description": "Whether it generates text or embeds it."}


def _list_of(name: str) -> Schema:
    return {"type": "array", "items": {"$ref": f"#/components/schemas/{name}"}}


SCHEMAS: dict[str, Schema] = {
    "Model": closed(
        id=TEXT,
        object={"const": "model"},
        created=COUNT,
        owned_by={"enum": ["lmaas", "tenant"]},
        parent={"type": ["string", "null"], "description": "The base model of an adapter."},
        max_model_len=COUNT,
        kind=_KIND,
    ),
    "ModelList": closed(object={"const": "list"}, data=_list_of("Model")),
    "AnthropicModel": closed(
        type={"const": "model"},
        id=TEXT,
        display_name=TEXT,
        created_at={"type": "string", "format": "date-time"},
        lifecycle={"const": "active"},
        max_input_tokens=COUNT,
        max_tokens=COUNT,
        kind=_KIND,
    ),
    "AnthropicModelList": closed(
        data=_list_of("AnthropicModel"),
        has_more={"type": "boolean"},
        first_id={"type": ["string", "null"]},
        last_id={"type": ["string", "null"]},
    ),
}
_VERSION: Schema = {
    "name": "anthropic-version",
    "in": "header",
    "required": False,
    "schema": TEXT,
    "description": "With this header, of any value, the answer has Anthropic's shape.",
}


def models_paths(headers: Schema, error: Any) -> dict[str, Any]:
    """Return the paths.

    `headers` are those of every response; `error` makes the description of a response that is an error from its words.
    """
    errors = {status: error(ERRORS[status]) for status in ("401", "403", "404")} | {"default": error("Another error.")}
    shape = {"anyOf": [{"$ref": "#/components/schemas/Error"}, {"$ref": "#/components/schemas/MessageError"}]}
    errors = {status: response | {"content": {"application/json": {"schema": shape}}} for status, response in errors.items()}

    def path(operation_id: str, summary: str, names: tuple[str, str], *parameters: Schema) -> Schema:
        schema = {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in names]}
        done = {"description": "Done.", "headers": headers, "content": {"application/json": {"schema": schema}}}
        operation = {"operationId": operation_id, "summary": summary, "tags": ["openai", "anthropic"]}
        return {"get": operation | {"parameters": [_VERSION, *parameters], "responses": {"200": done} | errors}}

    def query(name: str, schema: Schema, words: str) -> Schema:
        return {"name": name, "in": "query", "required": False, "schema": schema, "description": words}

    of_anthropic = "In Anthropic's shape:"
    return {
        "/v1/models": path(
            "list_models",
            "List the models that this tenant may call.",
            ("ModelList", "AnthropicModelList"),
            query(
                "limit",
                {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": PAGE},
                f"{of_anthropic} the size of a page.",
            ),
            query("after_id", TEXT, f"{of_anthropic} the page after this model."),
            query("before_id", TEXT, f"{of_anthropic} the page before this model."),
            query("adapters", {"type": "boolean", "default": True}, "Whether the list has the tenant's adapters, or base models only."),
        ),
        "/v1/models/{model}": path(
            "get_model",
            "Show a model.",
            ("Model", "AnthropicModel"),
            {"name": "model", "in": "path", "required": True, "schema": TEXT},
        ),
    }
