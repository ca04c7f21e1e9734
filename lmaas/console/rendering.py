"""Templates, and how they write numbers, times and money."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lmaas.console.api import Unread

FOLDER = Path(__file__).parent / "templates"
MICROUSD = 1_000_000
#: The text in place of a missing value.
NOTHING = "-"


class Templates:
    """The compiled templates. `asset` returns the address of a static file."""

    def __init__(self, asset: Callable[[str], str]) -> None:
        self._environment = Environment(
            loader=FileSystemLoader(FOLDER),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._environment.globals["asset"] = asset
        self._environment.tests["unread"] = lambda value: isinstance(value, Unread)
        self._environment.tests["expired"] = is_expired
        self._environment.filters.update(number=number, usd=usd, time=shown_time, size=size, duration=duration, percent=percent)

    def render(self, template: str, **context: Any) -> str:
        """Return the text that a template makes."""
        return self._environment.get_template(template).render(context)


def is_expired(key: Mapping[str, Any]) -> bool:
    """Return whether a key has expired."""
    return key["expires_at"] is not None and datetime.fromisoformat(key["expires_at"]) <= datetime.now(UTC)


def number(value: float | None) -> str:
    """Return a count with separators, such as 12,345."""
    return NOTHING if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def usd(microusd: float | None) -> str:
    """Return micro-dollars as dollars. Small amounts keep enough digits to differ from zero."""
    if microusd is None:
        return NOTHING
    dollars = abs(microusd) / MICROUSD
    digits = 2 if dollars >= 1 or dollars == 0 else 4 if dollars >= 0.001 else 6
    return f"{'-' if microusd < 0 else ''}${dollars:,.{digits}f}"


def shown_time(value: str | datetime | float | None, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """Return a time in UTC. It may be given in ISO 8601, or in seconds since 1970."""
    if value is None or value == "":
        return NOTHING
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    if not isinstance(moment, datetime):
        moment = datetime.fromtimestamp(moment, UTC)
    return moment.astimezone(UTC).strftime(form)


def size(count: float | None) -> str:
    """Return a number of bytes, such as 1.5 MiB."""
    if count is None:
        return NOTHING
    amount, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def duration(ms: float | None) -> str:
    """Return milliseconds as a time that people read, such as 1.2 s or 3 min 5 s."""
    if ms is None:
        return NOTHING
    if ms < 1000:
        return f"{ms:.0f} ms"
    seconds = ms / 1000
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def percent(ratio: float | None) -> str:
    """Return a ratio in per cent."""
    return NOTHING if ratio is None else f"{ratio * 100:.1f} %"
