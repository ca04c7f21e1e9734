"""The OpenAPI document is valid, complete, and agrees with the code."""

from dataclasses import fields
from typing import Any, get_args

import jsonschema
import pytest
from openapi_spec_validator import validate

from lmaas.admission.tiers import TIERS
from lmaas.api.shapes import files, models, tenants, usage
from lmaas.api.table import OPERATIONS, PLACES
from lmaas.app import openapi_document
from lmaas.files.service import UPLOADED, Purpose
from lmaas.protocols.messages.table import MESSAGES
from lmaas.protocols.parameters.table import CHAT, COMPLETION
from lmaas.protocols.pooling.embeddings import TABLE as EMBEDDINGS
from lmaas.protocols.pooling.ranking import RERANK, SCORE
from lmaas.states import START_PHASES, EnginePhase
from lmaas.types import Limits

SPEC = openapi_document()
OTHERS = {
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/messages", "POST"),
    ("/v1/responses", "POST"),
    ("/v1/embeddings", "POST"),
    ("/v1/rerank", "POST"),
    ("/v1/score", "POST"),
    ("/v1/tokenize", "POST"),
    ("/v1/detokenize", "POST"),
    ("/v1/messages/count_tokens", "POST"),
    ("/v1/responses/input_tokens", "POST"),
    *((path, "GET") for path in ("/v1/models", "/v1/models/{model}", "/health", "/healthz", "/readyz", "/metrics", "/openapi.json")),
}


def references(value: Any) -> set[str]:
    """Return the names of all referenced schemas."""
    if isinstance(value, dict):
        own = {value["$ref"].rpartition("/")[2]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*(references(item) for item in value.values()))
    return set().union(*(references(item) for item in value)) if isinstance(value, list) else set()


def test_the_document_is_valid_and_complete() -> None:
    validate(SPEC)
    described = {(path, method.upper()) for path, operations in SPEC["paths"].items() for method in operations}
    assert described == {(place.path, place.operation.method) for place in PLACES} | OTHERS
    names = [operation["operationId"] for operations in SPEC["paths"].values() for operation in operations.values()]
    assert len(names) == len(set(names))


def test_nothing_in_it_is_left_over() -> None:
    components = set(SPEC["components"]["schemas"]) | set(SPEC["components"]["headers"])
    assert references(SPEC) == components


def test_our_objects_have_no_other_fields() -> None:
    theirs = {"ChatMessage", "ChatCompletion", "ChatCompletionChunk", "Completion", "CompletionChunk", "TokenUsage", "InputMessage"}
    theirs.add("ResponseItem")
    for name, schema in SPEC["components"]["schemas"].items():
        if schema.get("type") == "object" and name not in theirs:
            assert schema["additionalProperties"] is False, name


def test_every_field_of_an_answer_is_required_unless_it_may_be_missing() -> None:
    for answer in (operation.answer for operation in OPERATIONS if operation.answer is not None):
        name = answer.__name__
        if name in SPEC["components"]["schemas"]:
            schema = SPEC["components"]["schemas"][name]
            assert set(schema["required"]) == set(schema["properties"]), name


def test_changes_have_an_audit_action_and_reads_have_none() -> None:
    for operation in OPERATIONS:
        # Stored requests and responses belong to the tenant: operators do not see them, and changing them leaves no record.
        is_of_requests = operation.path.startswith(("/v1/responses", "/v1/conversations"))
        assert not (is_of_requests and operation.for_operators)
        expected = operation.method == "GET" or operation.id == "check_adapter" or is_of_requests
        assert (operation.audit is None) == expected, operation.id
    create = SPEC["paths"]["/admin/v1/tenants"]["post"]
    assert (create["x-audit-action"], create["x-permission"]) == ("tenant.create", "operator")


def test_shapes_agree_with_what_they_are_made_from() -> None:
    limits = tuple(field.name for field in fields(Limits))
    assert tenants.Limits.__struct_fields__ == tenants.NewLimits.__struct_fields__ == limits
    assert set(get_args(tenants.Tier)) == set(TIERS)
    assert models.Start.__struct_fields__ == ("by", *START_PHASES)
    assert usage.EngineMs.__struct_fields__ == ("total", *EnginePhase)
    assert get_args(files.AnyPurpose) == tuple(Purpose)
    assert get_args(files.UploadPurpose) == UPLOADED


#: The schemas of the requests that generate no text, and their tables.
POOLING = (("EmbeddingsRequest", EMBEDDINGS), ("RerankRequest", RERANK), ("ScoreRequest", SCORE))


def test_every_parameter_of_the_gateway_is_described() -> None:
    for name, table in (("ChatRequest", CHAT), ("CompletionRequest", COMPLETION), ("MessagesRequest", MESSAGES), *POOLING):
        schema = SPEC["components"]["schemas"][name]
        assert set(schema["properties"]) == {"model", *table.by_name}
        untyped = {
            parameter.name
            for parameter in table.parameters
            if not schema["properties"][parameter.name].keys() & {"type", "enum", "anyOf"} and parameter.treatment == "forwarded"
        }
        assert untyped == set()


HELLO = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("name", "body", "valid"),
    [
        ("ChatRequest", HELLO, True),
        ("ChatRequest", HELLO | {"temperature": 0.5, "stop": ["a"], "tools": [], "stream": True, "seed": None}, True),
        ("ChatRequest", HELLO | {"use_beam_search": False}, True),
        ("ChatRequest", HELLO | {"use_beam_search": True}, False),
        ("ChatRequest", HELLO | {"temperature": 3}, False),
        ("ChatRequest", HELLO | {"tempurature": 1}, False),
        ("ChatRequest", {"model": "base"}, False),
        ("CompletionRequest", {"model": "base", "prompt": [[1, 2], [3]], "echo": True, "max_tokens": 0}, True),
        ("CompletionRequest", {"model": "base", "prompt": 5}, False),
        ("NewTenant", {"name": "acme", "tier": None, "requests_per_minute": 0}, True),
        ("NewTenant", {"name": "Acme"}, False),
        ("TenantChange", {"max_queued": 0}, False),
        ("NewBaseModel", {"name": "mod_1", "source": "x"}, False),
    ],
)
def test_bodies(name: str, body: dict[str, Any], valid: bool) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": SPEC["components"]}
    assert jsonschema.Draft202012Validator(schema).is_valid(body) is valid
