"""Reads the setting LMAAS_RAY_RESOURCES. It needs no Ray."""

from lmaas.errors import SettingsError


def parse_resources(text: str) -> dict[str, float]:
    """Return the amount of each named resource, from text like `name=1,other=0.5`. Raises SettingsError."""
    found: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, amount = item.partition("=")
        try:
            found[name.strip()] = float(amount)
        except ValueError:
            found[name.strip()] = 0.0
        if not name.strip() or not 0 < found[name.strip()] < float("inf"):
            raise SettingsError(f"LMAAS_RAY_RESOURCES must be like 'name=1,other=0.5', with amounts greater than 0, not {text!r}.")
    return found
