"""Lines of the logs of a stack: reading the formats of its processes, filtering, and showing them. Values without effects."""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

from lmaas.cli.tables import plain

#: The levels, the least important first.
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
#: Servers' names of levels that have another name here. Postgres' FATAL ends one session only; its other words, such as LOG, are INFO.
_POSTGRES = {"WARNING": "WARNING", "ERROR": "ERROR", "FATAL": "ERROR", "PANIC": "CRITICAL"}
_VALKEY = {".": "DEBUG", "-": "DEBUG", "*": "INFO", "#": "WARNING"}
_VLLM_LINE = re.compile(r"(?:\([^)]*\) )?(DEBUG|INFO|WARNING|ERROR|CRITICAL) (\d\d-\d\d \d\d:\d\d:\d\d) (.*)")
_PYTHON_LINE = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL):\s*(.*)")
_POSTGRES_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}) (\S+) \[\d+\] (?:\S+ )?([A-Z]+\d?):\s+(.*)")
_VALKEY_LINE = re.compile(r"\d+:[A-Z] (\d\d \w{3} \d{4} \d\d:\d\d:\d\d\.\d{3}) ([.*#-]) (.*)")
#: The fields of a structured line that are shown elsewhere.
_SHOWN = frozenset({"time", "level", "logger", "message", "exception"})


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of a log. `at` is in seconds since the epoch; `process` is what wrote it, with `replica` the id of its replica."""

    at: float
    level: str
    process: str
    replica: str | None
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The process, with a short form of the replica's id."""
        return self.process if self.replica is None else f"{self.process}/{self.replica.removeprefix('rep_')[:6]}"


@dataclass(frozen=True, slots=True)
class Filter:
    """The lines that are shown: those of these processes or replicas, from this level on, and about this request. None: of any."""

    processes: frozenset[str] = frozenset()
    level: str | None = None
    request: str | None = None

    def takes_source(self, process: str, replica: str | None) -> bool:
        """Return whether lines of a process are shown at all."""
        return not self.processes or process in self.processes or replica in self.processes

    def takes(self, line: LogLine) -> bool:
        """Return whether the line is shown."""
        if self.level is not None and LEVELS.index(line.level) < LEVELS.index(self.level):
            return False
        return self.request is None or self.request in line.text or self.request in line.fields.values()


def read_line(text: str, process: str, replica: str | None, before: LogLine | None, seen_at: float) -> LogLine:
    """Return a line of a log. One without a time, such as a line of a traceback, has time and level of the line `before`.

    `seen_at` is when the line was read, or its file last written: the time of a first line that has none, and the year of one that has a
    day and a month only.
    """
    if text.startswith("{") and (found := _structured(text, process, replica)) is not None:
        return found
    at, level, words = _of_server(text, seen_at)
    if at is None:
        at = before.at if before is not None else seen_at
    if level is None:
        level = before.level if before is not None else "INFO"
    return LogLine(at, level, process, replica, words)


def _structured(text: str, process: str, replica: str | None) -> LogLine | None:
    try:
        fields = json.loads(text)
        at = datetime.fromisoformat(fields["time"]).timestamp()
        level = fields["level"]
        if level not in LEVELS:
            return None
        return LogLine(at, level, process, replica, str(fields["message"]), fields)
    except (ValueError, LookupError, TypeError):
        return None


def _of_server(text: str, seen_at: float) -> tuple[float | None, str | None, str]:
    """Return time, level and words of a line of an engine, of Postgres or of Valkey."""
    if found := _VLLM_LINE.match(text):
        return _without_year(found[2], seen_at), found[1], found[3]
    if found := _POSTGRES_LINE.match(text):
        moment = datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S.%f")
        at = moment.replace(tzinfo=UTC).timestamp() if found[2] in ("UTC", "GMT") else moment.timestamp()
        return at, _POSTGRES.get(found[3], "INFO"), found[4]
    if found := _VALKEY_LINE.match(text):
        return datetime.strptime(found[1], "%d %b %Y %H:%M:%S.%f").timestamp(), _VALKEY[found[2]], found[3]
    if found := _PYTHON_LINE.match(text):
        return None, found[1], found[2]
    return None, None, text


def _without_year(text: str, seen_at: float) -> float | None:
    """Return a local time without a year: the latest one that is not after `seen_at`."""
    year = time.localtime(seen_at).tm_year
    for each in (year, year - 1):
        try:
            at = time.mktime(time.strptime(f"{each}-{text}", "%Y-%m-%d %H:%M:%S"))
        except ValueError:
            continue  # the 29th of February of another year
        if at <= seen_at + 86400:
            return at
    return None


def shown(line: LogLine, today: date) -> str:
    """Return a line for people: time (UTC, with the day unless it is `today`), level, process, text and the other fields. Control
    characters are escaped."""
    moment = datetime.fromtimestamp(line.at, UTC)
    clock = f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03d}"
    day = "" if moment.date() == today else f"{moment:%Y-%m-%d} "
    hidden = _SHOWN if line.replica is None else _SHOWN | {"replica_id"}
    fields = "".join(f" {name}={value}" for name, value in line.fields.items() if name not in hidden and value is not None)
    text = f"{day}{clock} {line.level:<8} {line.source:<17} {plain(line.text)}{plain(fields)}"
    exception = str(line.fields.get("exception") or "")
    return "\n".join([text, *(f"    {plain(each)}" for each in exception.splitlines())])


def as_json(line: LogLine) -> str:
    """Return a line as JSON, with the process and the replica that wrote it."""
    own = {"time": datetime.fromtimestamp(line.at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")}
    origin: dict[str, Any] = {"process": line.process} | ({} if line.replica is None else {"replica_id": line.replica})
    return json.dumps({**own, "level": line.level, "message": line.text, **line.fields, **origin})
