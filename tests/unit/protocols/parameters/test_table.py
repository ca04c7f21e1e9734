"""The tables of parameters: one row for each parameter, from which requests are read and the documentation is generated."""

import functools
from pathlib import Path
from typing import Any

import pytest

from lmaas.protocols.parameters.checks import boolean, integer, one_of
from lmaas.protocols.parameters.documentation import TABLES, page
from lmaas.protocols.parameters.reading import read_model, read_parameters
from lmaas.protocols.parameters.table import Table, Treatment, accepted, forwarded, refused
from tests.unit.protocols.parameters.build import refusal


def test_the_documentation_is_generated_from_the_tables() -> None:
    written = Path(__file__).parents[4] / "docs" / "reference" / "parameters.md"
    assert written.read_text() == page(), "run: python -m lmaas.protocols.parameters.documentation > docs/reference/parameters.md"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.path)
def test_a_parameter_has_one_row_in_a_table(table: Table) -> None:
    assert len(table.by_name) == len(table.parameters)
    assert "model" not in table.by_name
    assert all(table.by_name[name].treatment is Treatment.FORWARDED for name in table.required)


def test_a_table_is_the_rule_of_its_requests() -> None:
    table = Table(
        "things",
        "/v1/things",
        ("size",),
        (
            forwarded("size", "1 to 9", integer(1, 9)),
            forwarded("deep", "true or false", boolean),
            accepted("note", "a note"),
            accepted("mood", "good", one_of("good")),
            refused("side", "no sides", 0, ""),
        ),
    )
    read = functools.partial(read_parameters, table)
    given = {"size": 5, "note": [1], "mood": "good", "side": 0, "deep": None, "other": None, "model": 7}
    assert read(given) == {"size": 5}
    assert read({"side": "", "deep": False, "size": 1.0}) == {"deep": False, "size": 1}
    for body, expected in (
        ({"size": 5, "other": 0}, ("unsupported_parameter", "other")),
        ({"size": 5, "side": False}, ("unsupported_parameter", "side")),
        ({"size": 5, "mood": "bad"}, ("out_of_range", "mood")),
        ({"size": 10}, ("out_of_range", "size")),
        ({"size": None}, ("missing_parameter", "size")),
        ({}, ("missing_parameter", "size")),
    ):
        assert refusal(read, body) == expected


@pytest.mark.parametrize("model", [None, "", 5, [], {"a": 1}])
def test_a_request_names_its_model(model: Any) -> None:
    assert read_model({"model": "m"}) == "m"
    assert refusal(read_model, {"model": model}) == ("missing_parameter", "model")
