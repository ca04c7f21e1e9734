"""Rows of the API as tables for people."""

import re
from collections.abc import Mapping, Sequence
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
}
#: Columns of words, which may take several lines. What people copy stays in one piece.
_WRAPPED = frozenset({"reason", "target_modules", "source", "limits", "name", "filename", "error", "event_types"})
#: Columns of names, which may be long. With fewer columns than this, they are folded, so that more fit beside them.
_NAMES = frozenset({"name", "base_model", "model", "adapter", "tenant", "filename"})
FEWEST_COLUMNS = 3
#: The narrowest column of folded names.
FOLDED_WIDTH = 22
_HASH_LENGTH = 64
#: The beginning of a time in ISO 8601 that is more exact than a second, or has a zone.
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.+Z]")


def fitting(rows: Sequence[dict[str, Any]], columns: Sequence[str], width: int | None) -> tuple["Table", list[str]]:
    """Return a table of at most `width` characters, and the headings of the last columns if there was no room for them.

    Without a `width`, no column is left out, and every row is one line.
    """
    from rich.table import Table
    from rich.text import Text

    texts = {column: [_shortened(cell(row.get(column), money=is_money(column))) for row in rows] for column in columns}
    shown, hidden = _fitting_columns(columns, texts, width, folded=False)
    folded = len(shown) < min(FEWEST_COLUMNS, len(columns))
    if folded:
        # Long names take several lines, so that something is shown beside them.
        shown, hidden = _fitting_columns(columns, texts, width, folded=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in shown:
        number = is_money(column) or all(isinstance(row.get(column), int | float) for row in rows)
        title = heading(column)
        if width is not None:
            title = "\n".join(wrap(title, max(map(len, (*title.split(), *texts[column])))))
        may_wrap = column in _WRAPPED or (folded and column in _NAMES)
        least = None if width is None else min(width, _least_width(column, texts[column], folded))
        table.add_column(title, justify="right" if number else "left", overflow="fold", no_wrap=not may_wrap, min_width=least)
    for index in range(len(rows)):
        # A plain string would be read as markup, so that a name such as "[x]" would vanish.
        table.add_row(*(Text(texts[column][index]) for column in shown))
    return table, hidden


def _fitting_columns(
    columns: Sequence[str], texts: Mapping[str, Sequence[str]], width: int | None, *, folded: bool
) -> tuple[list[str], list[str]]:
    """Return the first columns for which there is room, and the headings of the others."""
    shown, hidden = list(columns), list[str]()
    while width is not None and len(shown) > 1 and sum(_least_width(each, texts[each], folded) + 2 for each in shown) - 2 > width:
        hidden.insert(0, heading(shown.pop()))
    return shown, hidden


def _least_width(column: str, texts: Sequence[str], folded: bool) -> int:
    """Return how narrow a column may be: words of prose and of headings stay whole, and so does every other value. With `folded`, names may
    be narrower."""
    pieces = heading(column).split()
    if folded and column in _NAMES:
        texts = [text[:FOLDED_WIDTH] for text in texts]
    for text in texts:
        pieces += text.split() if column in _WRAPPED else [text]
    return max(len(piece) for piece in pieces)


def lines(row: dict[str, Any], columns: Sequence[str], width: int | None = None) -> list[str]:
    """Return one row as a line for each column, broken between words where it would be longer than `width`."""
    headings = (heading(column) if is_money(column) else column.replace("_", " ") for column in columns)
    values = (cell(row.get(column), money=is_money(column)) for column in columns)
    return labelled(dict(zip(headings, values, strict=True)), width)


def labelled(texts: Mapping[str, str], width: int | None = None) -> list[str]:
    """Return each text after its heading. A line longer than `width` continues below its text; a word is never broken."""
    margin = max(map(len, texts)) + 2
    found = []
    for name, text in texts.items():
        label = f"{name:<{margin}}"
        if width is None or margin + len(text) <= width or not text.strip():
            found.append(label + text)
            continue
        room = max(width, margin + 20)
        found += wrap(text, room, initial_indent=label, subsequent_indent=" " * margin, break_long_words=False, break_on_hyphens=False)
    return found


def heading(column: str) -> str:
    """Return what a column is called in a table."""
    return SHORT.get(column, column).replace("_", " ")


def cell(value: Any, *, money: bool) -> str:
    """Return a value as text in one line: micro-dollars as dollars, moments to the second, control characters escaped."""
    if value is None:
        return "-"
    if money and isinstance(value, int):
        dollars, micro = divmod(abs(value), 1_000_000)
        return f"{'-' if value < 0 else ''}{dollars}.{micro:06d}"
    if isinstance(value, list):
        return plain(", ".join(str(item) for item in value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    return text[:19].replace("T", " ") if _MOMENT.match(text) else plain(text)


def plain(text: str) -> str:
    """Return a text without control characters, with which a name could change the terminal or look like another one."""
    return text if text.isprintable() else "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _shortened(text: str) -> str:
    """Return the start of a hash, which the heading names."""
    return text[:12] if len(text) == _HASH_LENGTH and text.isalnum() else text


def is_money(column: str) -> bool:
    """Return whether the numbers of a column are micro-dollars."""
    return column.endswith(("_microusd", "_price")) or column == "budget_per_month"
