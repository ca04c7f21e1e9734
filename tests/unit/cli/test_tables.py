"""Tables for people: they fit a terminal, and nothing is cut or left out silently."""

import io
from typing import Any

import pytest
from rich.console import Console

from lmaas.cli import adapters, keys, models, replicas, reports, tenants
from lmaas.cli.tables import cell, fitting, heading, lines

ID = "ten_0123456789abcdef0123"
ROW = {"id": ID, "name": "acme", "limits": "tokens_per_minute 100000, max_concurrent 8", "created_at": "2026-11-30T01:02:03.456+00:00"}


def shown(rows: list[dict[str, Any]], columns: tuple[str, ...], width: int | None) -> tuple[list[str], list[str]]:
    table, hidden = fitting(rows, columns, width)
    console = Console(file=io.StringIO(), width=width or 1000)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()], hidden


def test_without_a_width_each_row_is_one_line_with_every_column() -> None:
    text, hidden = shown([ROW, ROW], ("name", "id", "limits", "created_at"), None)
    assert hidden == []
    assert text == [
        "name  id                        limits                                      created at",
        *[f"acme  {ID}  tokens_per_minute 100000, max_concurrent 8  2026-11-30 01:02:03"] * 2,
    ]


@pytest.mark.parametrize(
    ("width", "missing"),
    [(80, 0), (70, 0), (69, 1), (49, 1), (48, 2), (30, 2), (29, 3), (4, 3)],
)
def test_the_last_columns_give_way_and_are_named(width: int, missing: int) -> None:
    text, hidden = shown([ROW, ROW], ("name", "id", "limits", "created_at"), width)
    assert hidden == ["id", "limits", "created at"][3 - missing :]
    words = " ".join(text).split()
    assert words.count("acme") == 2
    assert words.count(ID) == (0 if "id" in hidden else 2)
    assert words.count("tokens_per_minute") == (0 if "limits" in hidden else 2)


#: Every table of a command, with long values.
VALUES = {
    "id": "rep_0123456789abcdef0123", "name": "smollm2-135m-instruct", "base_model": "smollm2-135m-instruct", "model": "json-bot",
    "tenant": "globex", "day": "2026-11-30", "role": "tenant_admin", "tier": "standard", "dtype": "bfloat16", "content_hash": "ab" * 32,
    "limits": "tokens_per_minute 100000, max_concurrent 8", "reason": "the engine ended with code 1: no memory", "desired": "stopped",
    "observed": "starting", "url": "http://127.0.0.1:40000", "source": "/srv/models/smollm2", "target_modules": ["q_proj"],
    "status": "succeeded", "prefix": "sk-lmaas-abcdef",
}  # fmt: skip
TABLES = {
    "tenants": tenants.TENANT, "keys": keys.KEY, "adapters": adapters.ADAPTER, "versions": adapters.VERSION, "usage": reports.USAGE,
    "events": reports.EVENT, "base models": models.MODEL, "replicas": replicas.REPLICA, "costs": ("day", "tenant", *reports.COGS),
}  # fmt: skip


@pytest.mark.parametrize("columns", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("width", [80, 132])
def test_no_table_cuts_a_value_on_a_terminal(columns: tuple[str, ...], width: int) -> None:
    row = {name: "2026-11-30T01:02:03.456+00:00" if name.endswith("_at") else VALUES.get(name, 1_234_567) for name in columns}
    text, hidden = shown([row], columns, width)
    assert all(len(line) <= width for line in text)
    assert len(columns) - len(hidden) >= 3
    # Prose takes several lines, beside the other columns.
    everything = " ".join(" ".join(text).split())
    for name in columns:
        if heading(name) not in hidden and name not in ("limits", "reason", "source", "target_modules", "content_hash"):
            assert cell(row[name], money=name.endswith("_microusd")) in everything


def test_one_thing_is_a_line_for_each_value() -> None:
    row = ROW | {"content_hash": "ab" * 32, "charge_microusd": -1_500_000, "target_modules": ["q_proj", "v_proj"], "live": None}
    assert lines(row, ("name", "content_hash", "charge_microusd", "target_modules", "live")) == [
        "name            acme",
        f"content hash    {'ab' * 32}",
        "charge $        -1.500000",
        "target modules  q_proj, v_proj",
        "live            -",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0"), (True, "yes"), ("", ""), ([], ""), ("2026-11-30 01:02:03+00:00", "2026-11-30 01:02:03"), ("2026", "2026")],
)
def test_values_as_text(value: Any, text: str) -> None:
    assert cell(value, money=False) == text


def test_a_hash_is_cut_where_the_heading_says_so() -> None:
    text, _ = shown([{"content_hash": "ab" * 32}], ("content_hash",), None)
    assert text == ["content (first 12)", "ab" * 6]


def test_a_value_is_shown_as_it_is_without_changing_the_terminal() -> None:
    text, _ = shown([{"name": "[red]x[/red] \x1b[31m\r\né"}], ("name",), None)
    assert text == ["name", r"[red]x[/red] \x1b[31m\r\né"]
    assert lines({"name": "a\x07\u202eb"}, ("name",)) == [r"name  a\x07\u202eb"]


def test_a_long_name_is_folded_where_nothing_would_fit_beside_it() -> None:
    row = ROW | {"name": "n" * 63}
    text, hidden = shown([row], ("name", "id", "limits", "created_at"), 80)
    assert hidden == ["created at"]
    assert all(len(line) <= 80 for line in text)
    assert "".join(text).count("n") >= 63
    assert any(ID in line for line in text)
    # If it fits, a name stays in one piece.
    text, hidden = shown([row], ("name", "id", "limits", "created_at"), 120)
    assert any("n" * 63 in line for line in text)
    assert hidden == ["created at"]


def test_a_long_value_of_one_thing_continues_below_itself() -> None:
    limits = ", ".join(f"limit_{number} 100000" for number in range(8))
    text = lines({"id": ID, "limits": limits}, ("id", "limits"), 60)
    assert text[0] == f"id      {ID}"
    assert text[1].startswith("limits  limit_0 100000,")
    assert len(text) > 3
    assert all(line.startswith("        limit_") for line in text[2:])
    assert all(len(line) <= 60 for line in text)
    assert " ".join(" ".join(text[1:]).split()) == f"limits {limits}"
    # A path is never broken, since people copy it.
    assert lines({"source": "/" + "x" * 80}, ("source",), 40) == ["source  /" + "x" * 80]
