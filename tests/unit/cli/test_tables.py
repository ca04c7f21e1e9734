"""Tables for people: what fits a terminal, and that nothing is left out silently."""

import io
from typing import Any

import pytest
from rich.console import Console

from lmaas.cli.tables import cell, fitting, lines

ID = "ten_0123456789abcdef0123"
ROW = {"id": ID, "name": "acme", "limits": "tokens_per_minute 100000, max_concurrent 8", "created_at": "2026-11-30T01:02:03.456+00:00"}


def shown(width: int | None, *columns: str) -> tuple[list[str], list[str]]:
    table, hidden = fitting([ROW, ROW], columns, width)
    console = Console(file=io.StringIO(), width=width or 300)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines(), hidden


def test_without_a_width_each_row_is_one_line_with_every_column() -> None:
    text, hidden = shown(None, "name", "id", "limits", "created_at")
    assert hidden == []
    assert [line.rstrip() for line in text] == [
        "name  id                        limits                                      created at",
        *[f"acme  {ID}  tokens_per_minute 100000, max_concurrent 8  2026-11-30 01:02:03"] * 2,
    ]


@pytest.mark.parametrize(("width", "missing"), [(80, []), (72, []), (60, ["created at"]), (40, ["limits", "created at"]), (10, None)])
def test_the_last_columns_give_way_and_are_named(width: int, missing: list[str] | None) -> None:
    text, hidden = shown(width, "name", "id", "limits", "created_at")
    assert hidden == (["id", "limits", "created at"] if missing is None else missing)
    assert all(len(line) <= width for line in text)
    if missing is not None:
        assert text[1].startswith(f"acme  {ID}"), "what is copied stays in one piece"
    words = " ".join(" ".join(line.split()) for line in text)
    for word in [] if "limits" in hidden else ROW["limits"].split():
        assert word in words


def test_one_thing_is_a_line_for_each_value() -> None:
    row = ROW | {"content_hash": "ab" * 32, "charge_microusd": -1_500_000, "target_modules": ["q_proj", "v_proj"], "live": None}
    assert lines(row, ("name", "content_hash", "charge_microusd", "target_modules", "live")) == [
        "name             acme",
        f"content hash     {'ab' * 32}",
        "charge $         -1.500000",
        "target modules   q_proj, v_proj",
        "live             -",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (True, "yes"),
        ("", ""),
        ([], ""),
        ("2026-11-30 01:02:03+00:00", "2026-11-30 01:02:03"),
        ("2026-11-30", "2026-11-30"),
    ],
)
def test_values_as_text(value: Any, text: str) -> None:
    assert cell(value, money=False) == text


def test_a_hash_is_cut_where_the_heading_says_so() -> None:
    table, _ = fitting([{"content_hash": "ab" * 32}], ["content_hash"], None)
    [column] = table.columns
    assert (column.header, list(column.cells)) == ("content (first 12)", ["ab" * 6])
