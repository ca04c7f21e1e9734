"""Numbers that a person has typed into a form."""

import pytest

from lmaas.console.numbers import typed_number


@pytest.mark.parametrize(("text", "whole", "number"), [("5", True, 5), ("-1", True, -1), ("0.5", False, 0.5), ("1e3", False, 1000.0)])
def test_numbers_are_read(text: str, whole: bool, number: float) -> None:
    assert typed_number(text, whole=whole) == number


@pytest.mark.parametrize(
    ("text", "whole"),
    [("many", True), ("0.5", True), ("nan", False), ("inf", False), ("1e999", False), ("9" * 31, True), ("9" * 5000, True)],
)
def test_what_is_no_number_is_named(text: str, whole: bool) -> None:
    with pytest.raises(ValueError, match=f"'{text[:30]}' is not a{' whole' if whole else ''} number."):
        typed_number(text, whole=whole)
