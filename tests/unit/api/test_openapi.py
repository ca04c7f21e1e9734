"""The OpenAPI document describes what is served."""

from openapi_spec_validator import validate

from lmaas.api.openapi import QUERIES, SCHEMAS, SHAPES, document
from lmaas.api.routes import OPERATIONS


def test_the_document_is_valid_and_complete() -> None:
    spec = document([(method, prefix + path, handler) for prefix, method, path, handler in OPERATIONS])
    validate(spec)
    described = {(path, method.upper()) for path, operations in spec["paths"].items() for method in operations}
    served = {(prefix + path, method) for prefix, method, path, _ in OPERATIONS}
    openai = {(f"/v1/{path}", "POST") for path in ("chat/completions", "completions")} | {
        ("/v1/models", "GET"),
        ("/v1/models/{model}", "GET"),
    }
    assert described == served | openai
    for path in ("/v1/chat/completions", "/v1/completions"):
        [header] = spec["paths"][path]["post"]["parameters"]
        assert (header["name"], header["in"], header["required"]) == ("Idempotency-Key", "header", False)
        assert "409" in spec["paths"][path]["post"]["responses"]
    names = [operation["operationId"] for operations in spec["paths"].values() for operation in operations.values()]
    assert len(names) == len(set(names))


def test_nothing_in_it_is_left_over() -> None:
    handlers = {handler.__name__ for _, _, _, handler in OPERATIONS}
    assert set(SHAPES) == handlers
    assert set(QUERIES) <= handlers
    used = {name for takes, gives, _ in SHAPES.values() for name in (takes, gives)} | {
        "Error",
        "Model",
        "ChatRequest",
        "CompletionRequest",
        "OpenAIAnswer",
    }
    assert set(SCHEMAS) == used - {None}
