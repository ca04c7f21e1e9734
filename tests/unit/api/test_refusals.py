"""The refusals of every operation of the management API that need no database: keys, bodies and queries."""

import re

import httpx
import pytest

from lmaas.api.operation import Permission, Place
from lmaas.api.table import OPERATIONS
from lmaas.store.models import PRICES
from lmaas.types import MAX_PRICE, Principal, Role
from tests.unit.unreachable import INFERENCE, OPERATOR, TENANT, UnreachableGateway

PLACES = [place for operation in OPERATIONS for place in operation.places]
#: Where an operator names the tenant in the path, the gateway looks for the tenant first.
DIRECT = [place for place in PLACES if place.path != place.operation.operator_path]
#: Without the operations that read the tenant's limits before the body.
WITH_BODY = [place for place in DIRECT if place.operation.body is not None and not (place.operation.files or place.operation.reads_body)]
PAGED = [place for place in DIRECT if place.operation.is_paged]


def path_of(place: Place) -> str:
    """Return the path with a value for each of its parameters."""
    return re.sub(r"{\w+}", "x", place.path)


def named(places: list[Place]) -> pytest.MarkDecorator:
    """Return one test for each place."""
    return pytest.mark.parametrize("place", places, ids=lambda place: place.id)


def allows(permission: Permission, principal: Principal) -> bool:
    """Return whether a key may call an operation with this permission, at the path for its kind of key."""
    if permission is Permission.OPERATOR:
        return principal.role is Role.OPERATOR
    return principal.role is Role.TENANT_ADMIN or (permission is Permission.TENANT and principal.role is Role.INFERENCE)


@named(PLACES)
@pytest.mark.parametrize("principal", [OPERATOR, TENANT, INFERENCE], ids=lambda principal: principal.role)
async def test_a_key_without_the_permission(gateway: UnreachableGateway, place: Place, principal: Principal) -> None:
    async with gateway.client(principal) as client:
        response = await client.request(place.operation.method, path_of(place))
    refused = response.status_code == 403
    assert refused is not allows(place.permission, principal), response.text
    if refused:
        assert response.json()["error"]["code"] == "insufficient_permissions"


@named(PLACES)
async def test_no_key(operator: httpx.AsyncClient, place: Place) -> None:
    response = await operator.request(place.operation.method, path_of(place), headers={"authorization": "Bearer none"})
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


@named(WITH_BODY)
@pytest.mark.parametrize("content", [b"{", b"[]", b'{"nonsense": 1}', b'"\xff"'])
async def test_a_body_that_is_wrong(gateway: UnreachableGateway, place: Place, content: bytes) -> None:
    async with gateway.client(OPERATOR if place.permission is Permission.OPERATOR else TENANT) as client:
        response = await client.request(place.operation.method, path_of(place), content=content)
    assert response.status_code == 400, response.text


@named(PAGED)
@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=1000000"])
async def test_a_page_that_is_wrong(gateway: UnreachableGateway, place: Place, query: str) -> None:
    async with gateway.client(OPERATOR if place.permission is Permission.OPERATOR else TENANT) as client:
        response = await client.get(f"{path_of(place)}?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "limit"), response.text


@pytest.mark.parametrize("price", [-1, MAX_PRICE + 1, 1.5, True, "1"])
@pytest.mark.parametrize("name", PRICES)
async def test_prices_are_bounded_whole_numbers(operator: httpx.AsyncClient, name: str, price: object) -> None:
    response = await operator.patch("/admin/v1/base-models/base", json={name: price})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize(
    ("query", "param"),
    [("since=x", "since"), ("until=2026-13-01", "until"), ("by=", "by"), ("by=key", "by"), ("by=day,", "by"), ("format=xml", "format")],
)
async def test_what_a_cost_report_refuses(operator: httpx.AsyncClient, query: str, param: str) -> None:
    response = await operator.get(f"/admin/v1/cogs?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("since=2026-02-30", "since"),
        ("until=yesterday", "until"),
        ("since=2026-02-01&until=2026-01-31", "since"),
        ("by=", "by"),
        ("by=nothing", "by"),
        ("by=day;tenant", "by"),
        ("work=hard", "work"),
        ("format=xml", "format"),
        ("after=none", "after"),
        ("key=" + 101 * "k", "key"),
    ],
)
async def test_what_a_usage_report_refuses(operator: httpx.AsyncClient, query: str, param: str) -> None:
    response = await operator.get(f"/admin/v1/usage?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    "query", ["since=2026-02-01&until=2026-01-31", "since=2026-01-01&until=2026-02-01", "until=2026-01-01&since=2026-01-02"]
)
async def test_what_a_comparison_with_the_ledger_refuses(operator: httpx.AsyncClient, query: str) -> None:
    response = await operator.get(f"/admin/v1/usage/check?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "since")


@pytest.mark.parametrize("path", ["/v1/usage", "/v1/usage/events"])
async def test_a_key_for_inference_does_not_ask_for_the_usage_of_another(gateway: UnreachableGateway, path: str) -> None:
    async with gateway.client(INFERENCE) as client:
        response = await client.get(path, params={"key": "key_other"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "insufficient_permissions")
