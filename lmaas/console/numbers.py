"""Numbers that a person has typed into a form."""

import math

MAX_LENGTH = 30


def typed_number(text: str, *, whole: bool) -> int | float:
    """Return a number of a form. Raises ValueError with a message for the person."""
    kind = "a whole number" if whole else "a number"
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        number = math.nan
    if len(text) > MAX_LENGTH or not math.isfinite(number):
        raise ValueError(f"'{text[:MAX_LENGTH]}' is not {kind}.")
    return number


def number_or_text(text: str) -> int | str:
    """Return a whole number, which may have separators, or what was typed, which the API explains beside its field."""
    plain = text.replace(",", "").replace(" ", "")
    return int(plain) if plain.isascii() and plain.isdigit() and len(plain) < MAX_LENGTH else text
