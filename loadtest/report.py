"""Additional figures of a run in one table, printed after Locust's and added to its HTML report."""

import html
from pathlib import Path

from locust.stats import RequestStats, StatsEntry
from rich.console import Console
from rich.table import Table

HEADINGS = (
    "requests of", "answered", "failed", "429", "cut", "TTFT p50", "p95", "p99", "ITL p50", "p95", "p99", "E2E p50", "p95", "p99",
    "tok/s each", "tok/s all",
)  # fmt: skip
TITLE = "lmaas: streamed answers (ms, and completion tokens per second)"


def rows(stats: RequestStats) -> list[tuple[str, ...]]:
    """Return a row of texts for each name under which requests were reported.

    Times are as precise as Locust keeps them: two digits. Those of E2E are also of requests that failed. `tok/s each` is the median
    request's decoding, `tok/s all` that of all answered requests of this name together over the whole run.
    """
    # A look-up of a missing name would create an entry.
    entries = dict(stats.entries)
    found = []
    for name in sorted({name for name, kind in entries if kind in ("E2E", "429", "cut")}):
        e2e, ttft, itl, speed = (entries.get((name, kind)) for kind in ("E2E", "TTFT", "ITL", "tok/s"))
        failed = e2e.num_failures if e2e else 0
        counts = [(e2e.num_requests if e2e else 0) - failed, failed, *(_count(entries.get((name, kind))) for kind in ("429", "cut"))]
        times = [text for entry in (ttft, itl, e2e) for text in _percentiles(entry)]
        took_s = (stats.last_request_timestamp or 0) - stats.start_time
        every = f"{speed.total_content_length / took_s:.0f}" if speed and took_s > 0 else "-"
        found.append((name, *map(str, counts), *times, _percentiles(speed)[0], every))
    return found


def show(stats: RequestStats, html_file: str | None) -> None:
    """Print the table, and add it to Locust's report if there is one."""
    table = Table(*HEADINGS[:1], title=TITLE, title_justify="left")
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right")
    found = rows(stats)
    for row in found:
        table.add_row(*row)
    console = Console()
    Console(width=max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)).print(table)
    if html_file and Path(html_file).is_file():
        path = Path(html_file)
        path.write_text(added(path.read_text(), found))
        console.print(f"The report is in {path}.")


def added(page: str, found: list[tuple[str, ...]]) -> str:
    """Return Locust's page with the table before its end. Raises ValueError if the text is not a page."""
    lines = ["<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in found]
    head = "<tr>" + "".join(f"<th>{heading}</th>" for heading in HEADINGS) + "</tr>"
    style = "<style>#lmaas{font-family:sans-serif;margin:2em}#lmaas td,#lmaas th{padding:.3em .8em;text-align:right}</style>"
    ours = f'{style}<section id="lmaas"><h2>{TITLE}</h2><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></section>'
    before, end, after = page.rpartition("</body>")
    if not end:
        raise ValueError("Locust's report has no body.")
    return f"{before}{ours}{end}{after}"


def _count(entry: StatsEntry | None) -> int:
    return entry.num_requests if entry else 0


def _percentiles(entry: StatsEntry | None) -> list[str]:
    if entry is None or entry.num_requests == entry.num_none_requests:
        return ["-"] * 3
    return [f"{entry.get_response_time_percentile(share):g}" for share in (0.5, 0.95, 0.99)]
