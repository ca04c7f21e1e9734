"""Cells of CSV: texts that a spreadsheet would take for formulas, quotes, and numbers with all their digits."""

import csv
import io
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pytest

from lmaas.api.csv_reports import cell, dollars, lines
from lmaas.states import WorkClass


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        ("", ""),
        ("robot", "robot"),
        ("a=b", "a=b"),
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", "'\r=1"),
        ("\n=1", "'\n=1"),
        ("＝1", "'＝1"),  # noqa: RUF001 (a wide equals sign)
        # Numbers are numbers.
        (-1, "-1"),
        (0, "0"),
        (-0.25, "-0.25"),
        (True, "true"),
        (False, "false"),
        (Decimal("-0.000001"), "-0.000001"),
        (Decimal(0).scaleb(-12), "0.000000000000"),
        (date(2026, 11, 30), "2026-11-30"),
        (datetime(2026, 11, 30, 1, 2, 3, tzinfo=UTC), "2026-11-30T01:02:03+00:00"),
        (WorkClass.BACKGROUND, "background"),
        ({"put_back": 3, "cancelled": 4}, "put_back 3; cancelled 4"),
        ({}, ""),
    ],
)
def test_a_value_as_the_text_of_a_cell(value: Any, text: str) -> None:
    assert cell(value) == text


@pytest.mark.parametrize(
    ("amount", "digits", "text"),
    [
        (0, 6, "0.000000"),
        (1, 12, "0.000000000001"),
        (-1_500_000, 6, "-1.500000"),
        (2**63 + 1, 12, "9223372.036854775809"),
        (10**22, 12, "10000000000.000000000000"),
    ],
)
def test_dollars_have_all_their_digits(amount: int, digits: int, text: str) -> None:
    assert cell(dollars(amount, digits)) == text


def test_rows_are_read_as_they_were_written() -> None:
    rows = [["a", "b"], ['say "x", y', "two\r\nlines"], ["", "ü €"], ["'=1", ","]]
    written = lines(rows)
    assert written.startswith(b'a,b\r\n"say ""x"", y",')
    assert list(csv.reader(io.StringIO(written.decode(), newline=""), strict=True)) == rows
    assert lines([["\ud800"]]) == b"?\r\n"
