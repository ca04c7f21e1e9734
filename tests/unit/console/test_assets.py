"""The static files of the console: the vendored ones, their sizes, and their delivery."""

import gzip
import hashlib
import re

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from lmaas.console.assets import FOLDER, Assets

VENDOR = FOLDER / "vendor"
#: The files that the first page loads.
FIRST_PAGE = ("console.css", "app.js", "vendor/htmx.min.js", "icon.svg")


@pytest.fixture
def assets() -> Assets:
    return Assets("/console/static")


@pytest.fixture
def client(assets: Assets) -> TestClient:
    return TestClient(Starlette(routes=[assets.route]))


def test_vendored_files_are_those_that_were_published() -> None:
    listed = {name: digest for digest, name in (line.split() for line in (VENDOR / "SHA256SUMS").read_text().splitlines())}
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in VENDOR.iterdir() if path.suffix in (".js", ".css", ".txt")
    }
    assert found == listed


def test_every_vendored_file_has_a_licence_and_an_origin() -> None:
    origins = (VENDOR / "README.md").read_text()
    for path in VENDOR.iterdir():
        if path.suffix in (".js", ".css"):
            assert f"`{path.name}`" in origins
            assert (VENDOR / f"{path.name.split('.')[0]}.LICENSE.txt").exists()


def test_no_file_of_ours_loads_anything_from_elsewhere() -> None:
    for path in FOLDER.glob("*.*"):
        text = path.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|url\(|@import|\beval\b|new Function|innerHTML", text), path.name


def test_addresses_have_the_hash_of_the_file_and_are_kept_for_a_year(assets: Assets, client: TestClient) -> None:
    response = client.get(assets.url("console.css"))
    assert response.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert response.headers["content-type"] == "text/css; charset=utf-8"
    assert response.content == (FOLDER / "console.css").read_bytes()


@pytest.mark.parametrize("query", ["", "?v=", "?v=0123456789abcdef"])
def test_another_address_is_asked_for_again(assets: Assets, client: TestClient, query: str) -> None:
    response = client.get(f"/console/static/app.js{query}")
    assert response.headers["cache-control"] == "no-cache"
    again = client.get("/console/static/app.js", headers={"if-none-match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    ("accepted", "packed"),
    [("gzip", True), ("br, GZIP;q=0.5", True), ("gzip;q=0", False), ("identity", False), ("", False), ("*", False), ("x-gzip-not", False)],
)
def test_files_are_compressed_for_clients_that_accept_it(client: TestClient, accepted: str, packed: bool) -> None:
    with client.stream("GET", "/console/static/vendor/htmx.min.js", headers={"accept-encoding": accepted}) as response:
        raw = b"".join(response.iter_raw())
    assert response.headers["vary"] == "Accept-Encoding"
    assert ("content-encoding" in response.headers) is packed
    assert (gzip.decompress(raw) if packed else raw) == (VENDOR / "htmx.min.js").read_bytes()


@pytest.mark.parametrize("name", ["none.css", "../assets.py", "%2e%2e/assets.py", "vendor/SHA256SUMS", "vendor/", "", "console.css/"])
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/console/static/{name}").status_code == 404


def test_the_first_page_is_light(client: TestClient, assets: Assets) -> None:
    size = 0
    for name in FIRST_PAGE:
        with client.stream("GET", assets.url(name), headers={"accept-encoding": "gzip"}) as response:
            size += len(b"".join(response.iter_raw()))
    assert size < 60_000
