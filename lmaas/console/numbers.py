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
