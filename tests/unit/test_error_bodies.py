"""Errors in the shapes of the protocols."""

from http import HTTPStatus

import pytest

from lmaas.error_bodies import anthropic_body, anthropic_status, openai_body
from lmaas.errors import (
    AdapterUnavailable,
    Conflict,
    EngineFailed,
    Forbidden,
    InternalError,
    InvalidRequest,
    LmaasError,
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
    OverLimit,
    OverQuota,
    RequestFailed,
    SettingsError,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UnsupportedMediaType,
)
from lmaas.inference.request import context_exceeded
from tests.support.anthropic_stream import check_error


class Late(LmaasError):
    """An error kind that the service does not have yet."""

    status = HTTPStatus.GATEWAY_TIMEOUT


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequest("x"), 400, "invalid_request_error"),
        (UnsupportedMediaType("x"), 415, "invalid_request_error"),
        (MethodNotAllowed("POST"), 405, "invalid_request_error"),
        (Unauthenticated(), 401, "authentication_error"),
        (Forbidden("x"), 403, "permission_error"),
        (NotFound("x"), 404, "not_found_error"),
        (ModelNotFound("m"), 404, "not_found_error"),
        (Conflict("x"), 409, "conflict_error"),
        (TooLarge("x"), 413, "request_too_large"),
        (OverLimit("x"), 429, "rate_limit_error"),
        (OverQuota("x"), 429, "rate_limit_error"),
        (InternalError(), 500, "api_error"),
        (RequestFailed(), 500, "api_error"),
        (EngineFailed("x"), 500, "api_error"),
        (Unavailable("x"), 529, "overloaded_error"),
        (AdapterUnavailable("x"), 529, "overloaded_error"),
        (Late("x"), 504, "timeout_error"),
        (SettingsError("the password of postgres is wrong"), 500, "api_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, LmaasError) else None,
)
def test_anthropics_statuses_and_types(error: LmaasError, status: int, kind: str) -> None:
    body = anthropic_body(error, "req_1")
    check_error(body)
    assert anthropic_status(error) == status
    assert body["error"]["type"] == kind


def test_an_error_of_the_settings_is_not_shown() -> None:
    for body in (anthropic_body(SettingsError("postgres://admin"), "req_1"), openai_body(SettingsError("postgres://admin"))):
        assert "admin" not in str(body)
        assert body["error"]["code"] == "internal_error"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InvalidRequest("'messages.0.content' must be a list.", param="messages.0.content"), "messages.0.content: must be a list."),
        (InvalidRequest("The value of 'stop' is wrong.", param="stop"), "stop: The value of 'stop' is wrong."),
        (InvalidRequest("The body is wrong."), "The body is wrong."),
    ],
)
def test_the_field_stands_first_in_the_message(error: InvalidRequest, message: str) -> None:
    inner = anthropic_body(error, "req_1")["error"]
    assert (inner["message"], inner["param"]) == (message, error.param)
    assert inner["code"] == inner["details"]["error_code"] == "invalid_request"


@pytest.mark.parametrize(
    ("found", "begins"),
    [
        ("contains 2100 input tokens", "prompt is too long: 2100 tokens > 2048 maximum. This model's"),
        ("contains at least 2049 input tokens", "prompt is too long: at least 2049 tokens > 2048 maximum. This model's"),
        ("has 2100 tokens", "prompt is too long: 2100 tokens > 2048 maximum. This model's"),
        ("leaves no room for an answer", "prompt is too long. This model's"),
    ],
)
def test_a_long_prompt_has_the_words_that_clients_look_for(found: str, begins: str) -> None:
    inner = anthropic_body(context_exceeded("messages", 2048, found), "req_1")["error"]
    assert inner["message"].startswith(begins)
    assert (inner["type"], inner["param"]) == ("invalid_request_error", "messages")
