"""The tables of a run: printed after Locust's, and placed first in its HTML report."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    # Importing Locust changes Python's own modules.
    from locust.stats import RequestStats, StatsEntry

HEADINGS = (
    "requests of", "answered", "failed", "429", "cut", "TTFT p50", "p90", "p99", "ITL p50", "p90", "p99", "queue p50", "p90", "p99",
    "E2E p50", "p90", "p99", "tok/s each", "tok/s all",
)  # fmt: skip
ERRORS = ("requests of", "error", "count")
TITLE = "lmaas: streamed answers (ms, and completion tokens per second)"


def rows(stats: "RequestStats") -> list[tuple[str, ...]]:
    """Return a row of texts for each name under which requests were reported.

    Times are as precise as Locust keeps them: two digits. Queue times are the service's own. Those of E2E are also of requests that
    failed. `tok/s each` is the median request's decoding, `tok/s all` that of all answered requests of this name together over the whole
    run.
    """
    # A look-up of a missing name would create an entry.
    entries = dict(stats.entries)
    found = []
    for name in sorted({name for name, kind in entries if kind in ("E2E", "429", "cut")}):
        e2e, ttft, itl, queue, speed = (entries.get((name, kind)) for kind in ("E2E", "TTFT", "ITL", "queue", "tok/s"))
        failed = e2e.num_failures if e2e else 0
        counts = [(e2e.num_requests if e2e else 0) - failed, failed, *(_count(entries.get((name, kind))) for kind in ("429", "cut"))]
        times = [text for entry in (ttft, itl, queue, e2e) for text in _percentiles(entry)]
        took_s = (stats.last_request_timestamp or 0) - stats.start_time
        every = f"{speed.total_content_length / took_s:.0f}" if speed and took_s > 0 else "-"
        found.append((name, *map(str, counts), *times, _percentiles(speed)[0], every))
    return found


def error_rows(errors: Mapping[tuple[str, str], int]) -> list[tuple[str, ...]]:
    """Return a row of texts for each name and code of errors, the most frequent first."""
    ordered = sorted(errors.items(), key=lambda item: (-item[1], item[0]))
    return [(name, code, str(count)) for (name, code), count in ordered]


def show(stats: "RequestStats", errors: Mapping[tuple[str, str], int], html_file: str | None) -> None:
    """Print the tables, and put them first in Locust's report if there is one."""
    found, failed = rows(stats), error_rows(errors)
    _print(TITLE, HEADINGS, found)
    if failed:
        _print("Errors", ERRORS, failed)
    if html_file and Path(html_file).is_file():
        path = Path(html_file)
        path.write_text(added(path.read_text(), found, failed))
        Console().print(f"The report is in {path}.")


def _print(title: str, headings: Sequence[str], found: Sequence[tuple[str, ...]]) -> None:
    table = Table(*headings[:1], title=title, title_justify="left")
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    for row in found:
        table.add_row(*row)
    console = Console()
    Console(width=max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)).print(table)


def added(page: str, found: Sequence[tuple[str, ...]], failed: Sequence[tuple[str, ...]] = ()) -> str:
    """Return Locust's page with the tables at its beginning. Raises ValueError if the text is not a page."""
    body = re.search(r"<body[^>]*>", page)
    if body is None:
        raise ValueError("Locust's report has no body.")
    style = (
        "<style>#lmaas{font-family:sans-serif;margin:2em;overflow-x:auto}#lmaas td,#lmaas th{padding:.3em .8em;text-align:right}"
        "#lmaas{background:#fff;color:#111}</style>"
    )
    errors = f"<h2>Errors</h2>{_html(ERRORS, failed)}" if failed else "<p>No request failed.</p>"
    ours = f'{style}<section id="lmaas"><h2>{TITLE}</h2>{_html(HEADINGS, found)}{errors}</section>'
    return page[: body.end()] + ours + page[body.end() :]


def _html(headings: Sequence[str], found: Sequence[tuple[str, ...]]) -> str:
    head = "<tr>" + "".join(f"<th>{heading}</th>" for heading in headings) + "</tr>"
    lines = ["<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in found]
    return f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>"


def _count(entry: "StatsEntry | None") -> int:
    return entry.num_requests if entry else 0


def _percentiles(entry: "StatsEntry | None") -> list[str]:
    if entry is None or entry.num_requests == entry.num_none_requests:
        return ["-"] * 3
    return [f"{entry.get_response_time_percentile(share):g}" for share in (0.5, 0.9, 0.99)]
