"""Settings that do not work are reported to the operator of the service, and not to its clients."""

import logging

import pytest

from lmaas.error_bodies import openai_body
from lmaas.errors import InternalError, SettingsError
from lmaas.store.database import Database
from lmaas.types import Principal
from lmaas.web import auth
from tests.unit.unreachable import OPERATOR, TENANT, UnreachableGateway

MESSAGE = "The database login 'secret_login' may not act as a role that it needs. Run `lmaas migrate`."


@pytest.mark.parametrize(
    ("principal", "method", "path"),
    [
        (TENANT, "GET", "/v1/adapters"),
        (TENANT, "POST", "/v1/chat/completions"),
        (TENANT, "GET", "/v1/models"),
        (OPERATOR, "GET", "/admin/v1/tenants"),
    ],
)
async def test_the_client_gets_a_fixed_text_and_the_log_the_message(
    gateway: UnreachableGateway,
    principal: Principal,
    method: str,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(_: Database, __: str) -> Principal | None:
        raise SettingsError(MESSAGE)

    monkeypatch.setattr(auth, "find_principal", fail)
    async with gateway.client(principal) as client:
        answer = await client.request(method, path, json={} if method == "POST" else None)
    assert (answer.status_code, answer.json()) == (500, openai_body(InternalError()))
    assert answer.headers["x-should-retry"] == "false"
    [logged] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert (logged.__dict__["detail"], logged.__dict__["request_id"]) == (MESSAGE, answer.headers["x-request-id"])
