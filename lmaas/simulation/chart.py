"""Draws the results of a simulation as PNG, SVG or a self-contained HTML page."""

import html
import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmaas.errors import SettingsError
from lmaas.simulation.replay import Arrangement, Result
from lmaas.simulation.report import PERCENTILES, rows
from lmaas.simulation.tally import engines_over_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which people with any colour vision can distinguish; lines differ in their dashes as well.
STYLES = {
    Arrangement.ALWAYS_ON: ("#D55E00", (0, (6, 2))),
    Arrangement.SCALE_TO_ZERO: ("#E69F00", "solid"),
    Arrangement.SHARED: ("#0072B2", "solid"),
}
FORMATS = (".png", ".svg", ".html")
#: The maximum number of points of a curve. More points would not be visible.
POINTS = 2000
TTFT_MARKS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
INK, FAINT = "#222222", "#dddddd"


def check_chart(path: Path) -> None:
    """Raise SettingsError if a chart cannot be written to `path`. Called before anything is simulated."""
    if path.suffix not in FORMATS:
        raise SettingsError(f"The chart's file must end in {', '.join(FORMATS)}, not {path.name!r}.")
    if not path.absolute().parent.is_dir():
        raise SettingsError(f"The chart {path} cannot be written: its folder does not exist.")
    if find_spec("matplotlib") is None:
        raise SettingsError("Charts need matplotlib: pip install 'lmaas[chart]'.")


def write_chart(results: Sequence[Result], path: Path, title: str, notes: Sequence[str], warnings: Sequence[str] = ()) -> None:
    """Draw the results in the format of the file's suffix: .png, .svg or .html. Raises SettingsError if that is not possible."""
    check_chart(path)
    figure = _figure(results, title)
    try:
        if path.suffix == ".html":
            path.write_text(_page(results, figure, title, notes, warnings), encoding="utf-8")
        else:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise SettingsError(f"The chart {path} cannot be written: {error.strerror}.") from error


def _figure(results: Sequence[Result], title: str) -> "Figure":
    from matplotlib import rc_context  # noqa: PLC0415 (an extra)
    from matplotlib.figure import Figure  # noqa: PLC0415

    # The figure object without pyplot needs no window system and keeps no state. The same numbers give the same file.
    with rc_context({"svg.hashsalt": "lmaas", "font.size": 10, "svg.fonttype": "path"}):
        figure = Figure(figsize=(11, 7.2), layout="constrained")
        figure.suptitle(title, fontsize=13, color=INK)
        places = figure.subplot_mosaic([["time", "time"], ["cost", "wait"]], height_ratios=[1.05, 1])
        _draw_engines(places["time"], results)
        _draw_cost(places["cost"], results)
        _draw_waits(places["wait"], results)
        for axes in places.values():
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(colors=INK)
    return figure


def _draw_engines(axes: "Axes", results: Sequence[Result]) -> None:
    last_s = max((span.ended_s for result in results for span in result.tally.spans), default=0.0)
    unit_s, unit = (3600.0, "hours") if last_s > 3 * 3600 else (60.0, "minutes") if last_s > 300 else (1.0, "seconds")
    for result in results:
        steps = [(0.0, 0), *engines_over_time(result.tally.spans)]
        colour, dashes = STYLES[result.arrangement]
        times, counts = [when / unit_s for when, _ in steps], [count for _, count in steps]
        axes.step(times, counts, where="post", color=colour, linestyle=dashes, linewidth=1.3, label=str(result.arrangement))
        if result.arrangement is Arrangement.SHARED:
            axes.fill_between(times, counts, step="post", color=colour, alpha=0.15)
    most = max((result.tally.most_engines() for result in results), default=1)
    # Linear below 2, so that 0 and 1 are visible, and logarithmic above.
    axes.set_yscale("symlog", linthresh=2, linscale=0.8)
    marks = [mark for mark in (*range(min(most, 4) + 1), 5, 10, 20, 50, 100, 200, 500, 1000) if mark <= most * 1.2]
    axes.set_yticks(marks, [str(mark) for mark in marks])
    axes.minorticks_off()
    axes.set_ylim(0, most * 1.6)
    axes.set_xlim(0, last_s / unit_s or 1)
    axes.set_title("Engines that exist", loc="left")
    axes.set_xlabel(f"time since the first request ({unit})")
    axes.set_ylabel("engines")
    axes.grid(axis="y", color=FAINT)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(results), frameon=False, borderaxespad=0)


def _draw_cost(axes: "Axes", results: Sequence[Result]) -> None:
    shown = list(reversed(results))
    most_s = max((result.tally.engine_s for result in shown), default=0.0)
    unit_s, unit, short = (3600.0, "engine-hours", "h") if most_s > 3600 else (1.0, "engine-seconds", "s")
    hours = [result.tally.engine_s / unit_s for result in shown]
    axes.barh([_folded(result) for result in shown], hours, color=[STYLES[result.arrangement][0] for result in shown], height=0.6)
    most = max(hours, default=1) or 1
    for place, (result, value) in enumerate(zip(shown, hours, strict=True)):
        share = f", {value / most:.1%}" if value < most else ""
        axes.text(value + most * 0.02, place, f"{value:,.1f} {short} = ${result.cost_microusd / 1e6:,.2f}{share}", va="center", color=INK)
    axes.set_xlim(0, most * 1.55)
    axes.set_title("Engine time and its cost", loc="left")
    axes.set_xlabel(unit)
    axes.grid(axis="x", color=FAINT)
    axes.set_axisbelow(True)


def _folded(result: Result) -> str:
    return str(result.arrangement).replace(" per tenant", "\nper tenant")


def _draw_waits(axes: "Axes", results: Sequence[Result]) -> None:
    for result in results:
        figures = result.ttft_s
        if not figures:
            continue
        stride = max(1, len(figures) // POINTS)
        chosen = [*range(0, len(figures), stride), len(figures) - 1]
        colour, dashes = STYLES[result.arrangement]
        parts = [100 * (index + 1) / len(figures) for index in chosen]
        waits = [figures[index] for index in chosen]
        axes.plot(waits, parts, drawstyle="steps-post", color=colour, linestyle=dashes, linewidth=1.6, label=str(result.arrangement))
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    marks = [mark for mark in TTFT_MARKS_S if low <= mark <= high]
    axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axes.minorticks_off()
    axes.set_ylim(0, 101)
    for percent in PERCENTILES:
        axes.axhline(percent, color=FAINT, linewidth=0.8, zorder=0)
    axes.set_yticks([0, 25, *PERCENTILES], ["0", "25", *(f"p{percent}" if percent != 99 else "" for percent in PERCENTILES)])
    axes.set_title("Time to first token", loc="left")
    axes.set_xlabel("seconds")
    axes.set_ylabel("% of requests within")
    axes.grid(axis="x", color=FAINT)


HEADINGS = {
    "engine_s": "engine-seconds",
    "cost_microusd": "cost",
    "of_always_on": "÷ always-on",
    "busy": "busy",
    "most_engines": "engines at most",
    "starts": "engines started",
    "cold_requests": "requests that came cold",
    "ttft_p50_s": "TTFT p50, s",
    "ttft_p95_s": "TTFT p95, s",
    "ttft_p99_s": "TTFT p99, s",
    "completed": "completed",
    "expired": "given up after waiting too long",
    "refused": "refused because the queue was full",
}


def _page(results: Sequence[Result], figure: "Figure", title: str, notes: Sequence[str], warnings: Sequence[str]) -> str:
    picture = io.StringIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    svg = picture.getvalue()
    svg = svg[svg.index("<svg") :]  # without the document's head
    # A column for each arrangement, so that the table fits any window.
    lines = rows(results)
    head = "".join(f'<th scope="col">{_cell("arrangement", line["arrangement"])}</th>' for line in lines)
    body = "".join(
        f'<tr><th scope="row">{html.escape(heading)}</th>' + "".join(f"<td>{_cell(name, line[name])}</td>" for line in lines) + "</tr>"
        for name, heading in HEADINGS.items()
    )
    warned = "".join(f'<p class="warning" role="alert">{html.escape(warning)}</p>' for warning in warnings)
    said = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return PAGE.format(title=html.escape(title), svg=svg, head=head, body=body, notes=said, warnings=warned)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "cost_microusd":
        return f"${value / 1e6:,.2f}"
    if name == "of_always_on":
        return f"{value:.2%}"
    if name == "busy":
        return f"{value:.0%}"
    return html.escape(f"{value:,}" if isinstance(value, int | float) else str(value))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }}
h1 {{ font-size: 1.3em }} svg {{ width: 100%; height: auto }} .wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3em .8em; text-align: right; border-bottom: 1px solid #ddd }}
th {{ font-weight: 600; vertical-align: bottom }} tbody th {{ font-weight: 400; text-align: left }}
.warning {{ border-left: 4px solid #D55E00; background: #fdf1ea; padding: .6em 1em }}
</style></head><body>
<h1>{title}</h1>
{warnings}
<div class="wide"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>
{svg}
<ul>{notes}</ul>
</body></html>
"""
