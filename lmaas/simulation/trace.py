"""Traces of requests (time, tenant, adapter, tokens), read from CSV line by line."""

import csv
import math
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TextIO

from lmaas.errors import LmaasError

#: A number of tokens that no request has and no engine accepts.
MAX_TOKENS = 10_000_000
#: The latest valid time (the year 5138). Far larger numbers lose the precision of a millisecond.
MAX_TIME_S = 1e11
WRITTEN = ("time", "tenant", "adapter", "prompt_tokens", "completion_tokens")


class TraceError(LmaasError):
    """The file is not a valid trace. The message names the line and the problem."""

    kind, status, type, code = "invalid_trace", 400, "invalid_request_error", "invalid_trace"


@dataclass(frozen=True, slots=True)
class Columns:
    """The headings of the columns. Without a column of tenants or adapters, `Assignment` chooses them."""

    time: str = "time"
    tenant: str | None = "tenant"
    adapter: str | None = "adapter"
    prompt_tokens: str = "prompt_tokens"
    completion_tokens: str = "completion_tokens"

    def names(self) -> list[str]:
        """The required headings."""
        return [name for field in fields(self) if (name := getattr(self, field.name)) is not None]


#: The Azure LLM inference traces of 2023 and 2024 (Azure/AzurePublicDataset).
AZURE = Columns("TIMESTAMP", None, None, "ContextTokens", "GeneratedTokens")


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


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `at_s` is in seconds after the first request of the trace. `adapter` is empty for the base model."""

    at_s: float
    tenant: str
    adapter: str
    prompt_tokens: int
    completion_tokens: int


class Trace:
    """Requests in the order of time, in 28 bytes each, so that a day with millions of requests fits into memory.

    `remarks` report corrections that were made during reading.
    """

    def __init__(self) -> None:
        self._at_s = array("d")
        self._who = array("l")
        self._prompt_tokens, self._completion_tokens = array("i"), array("i")
        self._names: dict[tuple[str, str], int] = {}
        self._known: list[tuple[str, str]] = []
        self.remarks: list[str] = []

    def add(self, at_s: float, tenant: str, adapter: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Add a request. Its time is of any clock; `ordered` shifts it."""
        who = self._names.get((tenant, adapter))
        if who is None:
            who = self._names[tenant, adapter] = len(self._known)
            self._known.append((tenant, adapter))
        self._at_s.append(at_s)
        self._who.append(who)
        self._prompt_tokens.append(prompt_tokens)
        self._completion_tokens.append(completion_tokens)

    def ordered(self) -> "Trace":
        """Return the same requests in the order of time, starting at 0. Raises TraceError if there are none."""
        if not self._at_s:
            raise TraceError("The trace is empty: there is no request in it.")
        late = sum(later < earlier for earlier, later in pairwise(self._at_s))
        order: Sequence[int] = range(len(self._at_s))
        if late:
            order = sorted(order, key=self._at_s.__getitem__)
        first_s = self._at_s[order[0]]
        result = Trace()
        for index in order:
            result.add(
                self._at_s[index] - first_s, *self._known[self._who[index]], self._prompt_tokens[index], self._completion_tokens[index]
            )
        result.remarks = [*self.remarks, *([f"{late} requests came before the one above them: sorted by time."] if late else [])]
        return result

    def __len__(self) -> int:
        return len(self._at_s)

    def __iter__(self) -> Iterator[Request]:
        for at_s, who, prompt, completion in zip(self._at_s, self._who, self._prompt_tokens, self._completion_tokens, strict=True):
            yield Request(at_s, *self._known[who], prompt, completion)

    @property
    def span_s(self) -> float:
        """Seconds from the first request to the last."""
        return self._at_s[-1] - self._at_s[0]

    @property
    def tenants(self) -> list[str]:
        """The names of the tenants."""
        return sorted({tenant for tenant, _ in self._known})

    @property
    def adapters(self) -> int:
        """The number of different adapters."""
        return sum(adapter != "" for _, adapter in self._known)

    @property
    def tokens(self) -> tuple[int, int]:
        """The total numbers of prompt tokens and of completion tokens."""
        return sum(self._prompt_tokens), sum(self._completion_tokens)


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
            there = random.Random(f"{rule.seed}/{slot}")  # noqa: S311
            self._slot, self._present = slot, [number for number in range(rule.tenants) if there.random() < rule.present] or [0]
            self._weights = [(number + 1) ** -rule.zipf for number in self._present]
        return f"tenant-{self._chance.choices(self._present, self._weights)[0] + 1:02}"

    def adapter(self) -> str:
        weights = [(number + 1) ** -self._rule.zipf for number in range(self._rule.adapters)]
        return f"adapter-{self._chance.choices(range(self._rule.adapters), weights)[0] + 1}" if weights else ""


def read_trace(path: Path, columns: Columns | None = None, rule: Assignment | None = None) -> Trace:
    """Read a trace from a CSV file with a header line. Without `columns`, the default headings are used, or Azure's if the header has
    those.

    Times are seconds, or dates with times in ISO 8601. Raises TraceError.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _read(file, columns, rule or Assignment())
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path} is not a CSV file: it is not UTF-8 text ({error.reason}).") from error
    except TraceError as error:
        raise TraceError(f"{path}: {error.message}") from None


def _read(file: TextIO, columns: Columns | None, rule: Assignment) -> Trace:
    rows = csv.reader(file, strict=True)
    header = [name.strip() for name in _next(rows) or []]
    if not header:
        raise TraceError("The trace is empty: it has no header line.")
    if columns is None:
        columns = AZURE if set(AZURE.names()) <= set(header) else Columns()
        if columns.tenant not in header and columns.adapter not in header:
            columns = Columns(columns.time, None, None, columns.prompt_tokens, columns.completion_tokens)
    at = _places(columns, header)
    assigned, trace, raised = _Assigned(rule), Trace(), 0
    dates: bool | None = None
    while (row := _next(rows)) is not None:
        if not row:
            continue  # an empty line
        line = rows.line_num
        if len(row) != len(header):
            raise TraceError(f"line {line} has {len(row)} fields, but the header has {len(header)}.")
        at_s, date = _time(row[at[columns.time]], line)
        if dates is not None and date != dates:
            raise TraceError(f"line {line}: {row[at[columns.time]]!r} is a {'date' if date else 'number'}, unlike the times above it.")
        dates = date
        prompt, completion = (_tokens(row[at[name]], name, line) for name in (columns.prompt_tokens, columns.completion_tokens))
        tenant = assigned.tenant(at_s) if columns.tenant is None else row[at[columns.tenant]].strip()
        if not tenant:
            raise TraceError(f"line {line} names no tenant.")
        adapter = assigned.adapter() if columns.adapter is None else row[at[columns.adapter]].strip()
        # An adapter belongs to its tenant. Two tenants' adapters of the same name are different.
        trace.add(at_s, tenant, f"{tenant}/{adapter}" if adapter else "", max(1, prompt), max(1, completion))
        raised += prompt == 0 or completion == 0
    if raised:
        trace.remarks.append(f"{raised} requests without a prompt or a completion token: taken for one token.")
    return trace.ordered()


def _next(rows: "Iterator[list[str]]") -> list[str] | None:
    try:
        return next(rows, None)
    except csv.Error as error:
        raise TraceError(f"line {getattr(rows, 'line_num', 0)} is not CSV: {error}.") from error


def _places(columns: Columns, header: list[str]) -> dict[str, int]:
    wanted = columns.names()
    if missing := [name for name in wanted if name not in header]:
        raise TraceError(f"The header has no column {', '.join(map(repr, missing))}. It has: {', '.join(header)[:500]}.")
    if double := [name for name in wanted if header.count(name) > 1]:
        raise TraceError(f"The header has the column {double[0]!r} twice.")
    return {name: header.index(name) for name in wanted}


def _time(text: str, line: int) -> tuple[float, bool]:
    """Return the time in seconds, and whether it was a date."""
    try:
        seconds = float(text)
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


def write_trace(requests: Iterable[Request], file: TextIO) -> None:
    """Write requests as CSV, for `read_trace`."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(WRITTEN)
    for one in requests:
        writer.writerow((f"{one.at_s:.3f}", one.tenant, one.adapter.rpartition("/")[2], one.prompt_tokens, one.completion_tokens))
