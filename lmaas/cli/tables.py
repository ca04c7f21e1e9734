"""Rows of the API as tables for people."""

from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

#: Headings for narrow columns.
SHORT = {
    "failed_requests": "failed",
    "prompt_tokens": "prompt",
    "cached_tokens": "cached",
    "completion_tokens": "completion",
    "content_hash": "content (first 12)",
    # Money is shown in dollars.
    "cost_microusd": "cost $",
    "charge_microusd": "charge $",
    "margin_microusd": "margin $",
    "prompt_price": "prompt $/M",
    "cached_price": "cached $/M",
    "completion_price": "completion $/M",
    "engine_price": "engine $/h",
    "unpriced_requests": "no price",
}
#: Columns of words, which may take several lines. What people copy stays in one piece.
_WRAPPED = frozenset({"reason", "target_modules", "source", "limits", "name", "filename"})
_HASH_LENGTH = 64


def fitting(rows: Sequence[dict[str, Any]], columns: Sequence[str], width: int | None) -> tuple["Table", list[str]]:
    """Return a table of at most `width` characters, and the headings of the last columns if there was no room for them.

    Without a `width`, no column is left out, and every row is one line.
    """
    from rich.table import Table

    texts = {column: [_shortened(cell(row.get(column), money=is_money(column))) for row in rows] for column in columns}
    shown, hidden = list(columns), list[str]()
    while width is not None and len(shown) > 1 and sum(_least_width(column, texts[column]) + 2 for column in shown) - 2 > width:
        hidden.insert(0, heading(shown.pop()))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in shown:
        number = is_money(column) or all(isinstance(row.get(column), int | float) for row in rows)
        title = heading(column)
        if width is not None:
            title = "\n".join(wrap(title, max(map(len, (*title.split(), *texts[column])))))
        table.add_column(title, justify="right" if number else "left", overflow="fold", no_wrap=column not in _WRAPPED)
    for index in range(len(rows)):
        table.add_row(*(texts[column][index] for column in shown))
    return table, hidden


def _least_width(column: str, texts: Sequence[str]) -> int:
    """Return how narrow a column may be: words of prose and of headings stay whole, and so does every other value."""
    pieces = heading(column).split()
    for text in texts:
        pieces += text.split() if column in _WRAPPED else [text]
    return max(len(piece) for piece in pieces)


def lines(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """Return one row as a line for each column."""
    width = max(len(column) for column in columns)
    headings = [SHORT[column] if is_money(column) and column in SHORT else column.replace("_", " ") for column in columns]
    return [f"{name:<{width}}  {cell(row.get(column), money=is_money(column))}" for name, column in zip(headings, columns, strict=True)]


def heading(column: str) -> str:
    """Return what a column is called in a table."""
    return SHORT.get(column, column).replace("_", " ")


def cell(value: Any, *, money: bool) -> str:
    """Return a value as text: micro-dollars as dollars, moments to the second."""
    if value is None:
        return "-"
    if money and isinstance(value, int):
        dollars, micro = divmod(abs(value), 1_000_000)
        return f"{'-' if value < 0 else ''}{dollars}.{micro:06d}"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    return text[:19].replace("T", " ") if len(text) > 19 and text[4:5] == "-" and text[10:11] in "T " else text


def _shortened(text: str) -> str:
    """The start of a hash; the heading says so."""
    return text[:12] if len(text) == _HASH_LENGTH and text.isalnum() else text


def is_money(column: str) -> bool:
    """Return whether the numbers of a column are micro-dollars."""
    return column.endswith(("_microusd", "_price")) or column == "budget_per_month"
