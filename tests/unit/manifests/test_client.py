"""The client of the management API: requests that it refuses to send, and responses of other servers."""

import json
from contextlib import closing
from typing import Any

import pytest

from lmaas.api import table
from lmaas.errors import ApiError, InvalidRequest, LmaasError, SettingsError
from lmaas.manifests.client import ApiClient
from tests.support.foreign_server import serving

SECRET = "sk-lmaas-secret"
NOWHERE = "http://127.0.0.1:1/v1"


@pytest.mark.parametrize("key", [f"{SECRET}\nx", f"a {SECRET}", f"{SECRET}é", f"{SECRET}\0", f"{SECRET}\x7f", f"{SECRET}\udcff"])
def test_a_key_that_no_header_may_have_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(SettingsError, match="The API key has") as raised:
        ApiClient(NOWHERE, key)
    assert SECRET not in raised.value.message


@pytest.mark.parametrize("key", [f"{SECRET}\n", f"{SECRET}\r\n", f" {SECRET}\r", f"{SECRET}\t"])
def test_space_around_a_key_is_no_part_of_it(key: str) -> None:
    with closing(ApiClient(NOWHERE, key)) as client, pytest.raises(SettingsError, match="cannot be reached") as raised:
        client.send(table.LIST_TENANTS)
    assert SECRET not in raised.value.message


@pytest.mark.parametrize("url", ["http://[::1", "http://h:x/v1", "http://h:99999", "ftp://h", "127.0.0.1:8080", "", "/v1", "http://", "é"])
def test_an_address_that_is_none_is_said(url: str) -> None:
    with pytest.raises(SettingsError, match="LMAAS_URL"):
        ApiClient(url, SECRET)


def test_a_password_in_the_address_is_not_shown() -> None:
    with closing(ApiClient("http://me:hidden@127.0.0.1:1/v1", SECRET)) as client, pytest.raises(SettingsError) as raised:
        client.send(table.LIST_TENANTS)
    assert "http://127.0.0.1:1 cannot be reached" in raised.value.message
    assert "hidden" not in raised.value.message


@pytest.mark.parametrize("tenant", ["", ".", "..", "%2e%2e", "a/b", "a\\b", "\udcff"])
def test_a_tenant_that_would_lead_elsewhere_is_refused_before_anything_is_sent(tenant: str) -> None:
    with closing(ApiClient(NOWHERE, SECRET, tenant)) as client:
        for operation, path in ((table.CREATE_KEY, {}), (table.DELETE_ADAPTER, {"name": "bot"}), (table.LIST_KEYS, {})):
            with pytest.raises(InvalidRequest, match="There can be no tenant"):
                client.send_to(operation, path)
        with pytest.raises(InvalidRequest, match="There can be no tenant"):
            client.send(table.DELETE_TENANT, tenant=tenant)


def test_a_value_that_is_not_text_is_said() -> None:
    with closing(ApiClient(NOWHERE, SECRET)) as client, pytest.raises(InvalidRequest, match="not valid text"):
        client.send(table.CREATE_TENANT, {"name": "\udcff"})
    with closing(ApiClient(NOWHERE, SECRET)) as client, pytest.raises(InvalidRequest, match="not valid text"):
        client.send(table.LIST_ALL_EVENTS, query={"tenant": "\udcff"})


STRANGE: list[Any] = [[], 5, None, "x", {"ok": True}, {"error": "bad"}, {"data": 5}, {"data": [5]}]
ROW = {"object": "tenant", "id": "ten_1", "name": "acme"}


@pytest.mark.parametrize(
    ("status", "body"),
    [
        *((200, json.dumps(value)) for value in STRANGE),
        (200, json.dumps({"data": [ROW], "first_id": None, "last_id": None, "has_more": False})),
        (200, ""),
        (200, "<html>"),
        (204, ""),
        (302, "{}"),
        (404, "{}"),
        (500, "[]"),
        (500, json.dumps({"error": "bad"})),
        (500, json.dumps({"error": {"message": 5}})),
        (500, json.dumps({"error": None})),
        (502, ""),
        (502, "<html>Bad gateway</html>"),
    ],
)
def test_an_answer_that_is_not_the_services_is_said(status: int, body: str) -> None:
    with serving(status, body.encode()) as url, closing(ApiClient(url, SECRET)) as client:
        with pytest.raises(ApiError) as raised:
            client.items(table.LIST_TENANTS)
        assert raised.value.message == f"The service at {url} answered with something that is not lmaas (status {status}). Check LMAAS_URL."
        with pytest.raises((ApiError, LmaasError)):
            client.send(table.DELETE_TENANT, tenant="acme")


def test_further_fields_are_a_newer_releases() -> None:
    answer = {"object": "tenant.deleted", "id": "ten_1", "deleted": True, "new": 1}
    with serving(200, json.dumps(answer).encode()) as url, closing(ApiClient(url, SECRET)) as client:
        assert client.send(table.DELETE_TENANT, tenant="acme") == answer


def test_an_error_of_the_service_is_its_own_words() -> None:
    body = json.dumps({"error": {"message": "No.", "type": "t", "param": "name", "code": "no"}}).encode()
    with serving(409, body) as url, closing(ApiClient(url, SECRET)) as client, pytest.raises(ApiError) as raised:
        client.send(table.CREATE_TENANT, {"name": "acme"})
    assert (raised.value.status, raised.value.message, raised.value.code, raised.value.param) == (409, "No.", "no", "name")
