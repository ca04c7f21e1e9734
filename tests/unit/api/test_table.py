"""The table of operations is the only place that contains the paths of the management API."""

import re
from pathlib import Path

import httpx
import pytest

import lmaas
from lmaas.api import table
from lmaas.api.operation import Permission, Place, filled, page_of
from lmaas.api.routes import HANDLERS
from lmaas.api.table import OPERATIONS, PLACES
from lmaas.errors import InvalidRequest

ROOT = Path(lmaas.__file__).parents[1]
MANAGEMENT = re.compile(r"""["']/(admin/v1|v1/(adapters|keys|usage))""")


def test_every_operation_has_a_handler_and_a_place_of_its_own() -> None:
    assert set(HANDLERS) == {operation.id for operation in OPERATIONS}
    assert len({place.id for place in PLACES}) == len({(place.operation.method, place.path) for place in PLACES}) == len(PLACES)


def test_operators_reach_a_tenants_resources_under_its_name() -> None:
    own, of_tenant = table.ACTIVATE_VERSION.places
    assert (own.path, own.permission) == ("/v1/adapters/{name}/activate", Permission.TENANT_ADMIN)
    assert (of_tenant.path, of_tenant.permission) == ("/admin/v1/tenants/{tenant}/adapters/{name}/activate", Permission.OPERATOR)
    assert of_tenant.parameters == ["tenant", "name"]
    for operation in (table.LIST_TENANTS, table.REPORT_USAGE):
        assert len(operation.places) == 1


def test_a_parameter_stays_one_segment_of_the_path() -> None:
    path = filled("/a/{x}/b/{y}", {"x": "c?d#e..", "y": "é"})
    assert path == "/a/c%3Fd%23e../b/%C3%A9"
    assert httpx.URL(f"http://host{path}").raw_path == path.encode()
    with pytest.raises(KeyError):
        filled("/a/{x}", {})


HOSTILE = [
    "",
    ".",
    "..",
    "%2e%2e",
    "%2E",
    "a%2fb",
    "/",
    "a/b",
    "../..",
    "a/../b",
    "\\",
    "..\\",
    "a\\b",
    "a\nb",
    "a\0",
    "..\r",
    "\udcff",
    "a\x7f",
]


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("place", [place for place in PLACES if place.parameters], ids=lambda place: place.id)
def test_a_value_that_would_lead_to_another_operation_is_refused(place: Place, value: str) -> None:
    for parameter in place.parameters:
        values = dict.fromkeys(place.parameters, "fine") | {parameter: value}
        with pytest.raises(InvalidRequest, match="There can be no") as raised:
            filled(place.path, values)
        assert raised.value.message.isascii()
        assert raised.value.message.isprintable()


def test_a_row_too_many_says_that_there_is_another_page() -> None:
    page = page_of([1, 2, 3], ["a", "b", "c"], 2)
    assert (page.data, page.first_id, page.last_id, page.has_more) == ([1, 2], "a", "b", True)
    page = page_of([], [], 2)
    assert (page.data, page.first_id, page.last_id, page.has_more) == ([], None, None, False)


@pytest.mark.parametrize("folder", ["lmaas", "bench", "loadtest"])
def test_no_other_code_spells_these_paths(folder: str) -> None:
    allowed = {ROOT / "lmaas/api/table.py", ROOT / "lmaas/api/operation.py"}
    spelled = {
        f"{path.relative_to(ROOT)}: {found[0]}"
        for path in (ROOT / folder).rglob("*.py")
        if path not in allowed
        for found in [MANAGEMENT.search(path.read_text())]
        if found is not None
    }
    assert spelled == set()
