"""Reads traces from CSV and from JSON lines, ours and public ones."""

import csv
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from lmaas.simulation.trace import Trace, TraceError

#: A number of tokens that no request has and no engine accepts.
MAX_TOKENS = 10_000_000
#: The latest valid time (the year 5138). Far larger numbers lose the precision of a millisecond.
MAX_TIME_S = 1e11
#: The longest line of JSON: Mooncake's have a number for each 512 tokens of a prompt.
MAX_LINE = 1_000_000
#: The white space that may precede the first line.
MAX_BLANK = 1000


@dataclass(frozen=True, slots=True)
class Columns:
    """The headings of the columns, or the names of the fields of JSON lines. Without tenants or adapters, `Assignment` chooses them.

    `unit_s` is the unit of times that are numbers, in seconds.
    """

    time: str = "time"
    tenant: str | None = "tenant"
    adapter: str | None = "adapter"
    prompt_tokens: str = "prompt_tokens"
    completion_tokens: str = "completion_tokens"
    unit_s: float = 1.0

    def names(self) -> list[str]:
        """The required headings."""
        every = (self.time, self.tenant, self.adapter, self.prompt_tokens, self.completion_tokens)
        return [name for name in every if name is not None]


#: The Azure LLM inference traces of 2023 and 2024 (Azure/AzurePublicDataset).
AZURE = Columns("TIMESTAMP", None, None, "ContextTokens", "GeneratedTokens")
#: BurstGPT (HPMLL/BurstGPT), whose times are seconds.
BURSTGPT = Columns("Timestamp", None, None, "Request tokens", "Response tokens")
#: The traces of Mooncake (kvcache-ai/Mooncake): JSON lines, whose times are milliseconds.
MOONCAKE = Columns("timestamp", None, None, "input_length", "output_length", unit_s=0.001)
#: Public traces, which are recognised by their names.
PUBLIC = (AZURE, BURSTGPT, MOONCAKE)


@dataclass(frozen=True, slots=True)
class Assignment:
    """The rule that assigns requests to tenants and adapters if a trace does not contain them.

    The seed decides which tenants are active in each slot of time. A request belongs to one of the active tenants, with more popular ones
    more often (the n-th with 1/n^`zipf`). A tenant uses one adapter, again the popular ones more often.
    """

    tenants: int = 50
    adapters: int = 1
    seed: int = 0
    zipf: float = 1.0
    slot_s: float = 600.0
    present: float = 0.2


class _Assigned:
    """Assigns requests by the rule of `Assignment`."""

    def __init__(self, rule: Assignment) -> None:
        self._rule = rule
        self._chance = random.Random(rule.seed)  # noqa: S311 (a rule, not a secret)
        self._slot: int | None = None
        self._present: list[int] = []
        self._weights: list[float] = []

    def tenant(self, at_s: float) -> str:
        rule = self._rule
        slot = math.floor(at_s / rule.slot_s)
        if slot != self._slot:
            # Depends on the slot only, so that the order of lines does not change which tenants are active.
            there = random.Random(f"{rule.seed}/{slot}")  # noqa: S311 (a rule, not a secret)
            self._slot, self._present = slot, [number for number in range(rule.tenants) if there.random() < rule.present] or [0]
            self._weights = [(number + 1) ** -rule.zipf for number in self._present]
        return f"tenant-{self._chance.choices(self._present, self._weights)[0] + 1:02}"

    def adapter(self) -> str:
        weights = [(number + 1) ** -self._rule.zipf for number in range(self._rule.adapters)]
        return f"adapter-{self._chance.choices(range(self._rule.adapters), weights)[0] + 1}" if weights else ""


def read_trace(path: Path, columns: Columns | None = None, rule: Assignment | None = None) -> Trace:
    """Read a trace from a CSV file with a header line, or from JSON lines. Without `columns`, those of a public trace are used if the file
    has their names, else the default ones.

    Times are numbers in the unit of the columns, or dates with times in ISO 8601. Raises TraceError.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _read(file, columns, rule or Assignment())
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path} is neither CSV nor JSON lines: it is not UTF-8 text ({error.reason}).") from error
    except TraceError as error:
        raise TraceError(f"{path}: {error.message}") from None


def _read(file: TextIO, columns: Columns | None, rule: Assignment) -> Trace:
    source = _JsonLines(file) if _is_json(file) else _Csv(file)
    columns = columns or _columns_of(source.names)
    assigned, trace, raised = _Assigned(rule), Trace(), 0
    dates: bool | None = None
    for line, values in source.rows(columns.names()):
        given = dict(zip(columns.names(), values, strict=True))
        at_s, date = _time(given[columns.time], columns.unit_s, line)
        if dates is not None and date != dates:
            raise TraceError(f"line {line}: {given[columns.time]!r} is a {'date' if date else 'number'}, unlike the times above it.")
        dates = date
        prompt, completion = (_tokens(given[name], name, line) for name in (columns.prompt_tokens, columns.completion_tokens))
        tenant = assigned.tenant(at_s) if columns.tenant is None else given[columns.tenant].strip()
        if not tenant:
            raise TraceError(f"line {line} names no tenant.")
        adapter = assigned.adapter() if columns.adapter is None else given[columns.adapter].strip()
        # An adapter belongs to its tenant. Two tenants' adapters of the same name are different.
        trace.add(at_s, tenant, f"{tenant}/{adapter}" if adapter else "", max(1, prompt), max(1, completion))
        raised += prompt == 0 or completion == 0
    if raised:
        trace.remarks.append(f"{raised} requests without a prompt or a completion token: taken for one token.")
    return trace.ordered()


def _columns_of(names: Sequence[str]) -> Columns:
    """Return the columns of a public trace that has all these names, else ours."""
    for known in PUBLIC:
        if set(known.names()) <= set(names):
            return known
    columns = Columns()
    if columns.tenant not in names and columns.adapter not in names:
        return replace(columns, tenant=None, adapter=None)
    return columns


def _is_json(file: TextIO) -> bool:
    """Return whether a file has JSON lines: its first character that is not white space is a brace."""
    first = file.read(MAX_BLANK).lstrip()[:1]
    file.seek(0)
    return first == "{"


class _Csv:
    """Rows of a CSV file with a header line."""

    def __init__(self, file: TextIO) -> None:
        self._rows = csv.reader(file, strict=True)
        self.names = [name.strip() for name in self._next() or []]
        if not self.names:
            raise TraceError("The trace is empty: it has no header line.")

    def rows(self, wanted: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        """Return the number of each line and the values of these columns."""
        header = self.names
        if missing := [name for name in wanted if name not in header]:
            raise TraceError(f"The header has no column {', '.join(map(repr, missing))}. It has: {', '.join(header)[:500]}.")
        if double := [name for name in wanted if header.count(name) > 1]:
            raise TraceError(f"The header has the column {double[0]!r} twice.")
        places = [header.index(name) for name in wanted]
        while (row := self._next()) is not None:
            if not row:
                continue  # an empty line
            if len(row) != len(header):
                raise TraceError(f"line {self._rows.line_num} has {len(row)} fields, but the header has {len(header)}.")
            yield self._rows.line_num, [row[place] for place in places]

    def _next(self) -> list[str] | None:
        try:
            return next(self._rows, None)
        except csv.Error as error:
            raise TraceError(f"line {self._rows.line_num} is not CSV: {error}.") from error


class _JsonLines:
    """Rows of a file with a JSON object in each line. The names are those of the first object."""

    def __init__(self, file: TextIO) -> None:
        self._rows = self._objects(file)
        first = next(self._rows)
        self.names = list(first[1])
        self._all = chain([first], self._rows)

    def rows(self, wanted: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        """Return the number of each line and the values of these fields."""
        for line, found in self._all:
            values = [found.get(name) for name in wanted]
            for name, value in zip(wanted, values, strict=True):
                if isinstance(value, bool) or not isinstance(value, int | float | str):
                    raise TraceError(f"line {line} has no number or text {name!r}. It has: {', '.join(found)[:500]}.")
            yield line, [str(value) for value in values]

    @staticmethod
    def _objects(file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
        line = 0
        while text := file.readline(MAX_LINE):
            line += 1
            if not text.strip():
                continue
            if len(text) == MAX_LINE and not text.endswith("\n"):
                raise TraceError(f"line {line} has more than {MAX_LINE:,} characters.")
            try:
                found = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise TraceError(f"line {line} is not JSON: {error}.") from error
            if not isinstance(found, dict):
                raise TraceError(f"line {line} is no JSON object.")
            yield line, found


def _time(text: str, unit_s: float, line: int) -> tuple[float, bool]:
    """Return the time in seconds, and whether it was a date."""
    try:
        seconds = float(text) * unit_s
    except ValueError:
        try:
            date = datetime.fromisoformat(text.strip())
        except ValueError:
            raise TraceError(f"line {line}: {text[:50]!r} is not a time (seconds, or a date and time in ISO 8601).") from None
        return (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp(), True
    if not -MAX_TIME_S < seconds < MAX_TIME_S:
        raise TraceError(f"line {line}: {text[:50]!r} is not a time.")
    return seconds, False


def _tokens(text: str, name: str, line: int) -> int:
    try:
        # Some tools write whole numbers as 12.0.
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise TraceError(f"line {line}: {name} is {text[:50]!r}, which is not a whole number.")
    if not 0 <= number <= MAX_TOKENS:
        raise TraceError(f"line {line}: {name} is {text[:50]}, which is not between 0 and {MAX_TOKENS}.")
    return int(number)
