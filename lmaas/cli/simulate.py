"""`lmaas simulate`: what a trace would cost, without an engine."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmaas.cli.context import Context
from lmaas.cli.money import PRICE
from lmaas.cli.progress import count_bar
from lmaas.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from lmaas.simulation.generate import Day
    from lmaas.simulation.profile import Profile
    from lmaas.simulation.reading import Columns
    from lmaas.simulation.trace import Trace

COLUMN_NAMES = ("time", "tenant", "adapter", "prompt_tokens", "completion_tokens")
UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("trace", type=FILE, required=False)
@click.option("--generate", "generated", type=FILE, help="Write a generated day with bursts to this file. Without a TRACE, that is all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of a generated day, and of the tenants of a trace without any.")
@click.option("--tenants", type=click.IntRange(1, 100_000), default=50, show_default=True, help="Generated tenants.")
@click.option("--adapters", type=click.IntRange(0, 1000), default=1, show_default=True, help="Adapters of each. 0: the base model.")
@click.option("--bursts", type=click.FloatRange(1), default=1500, show_default=True, help="Bursts of all tenants in a generated day.")
@click.option("--column", "named", multiple=True, metavar="NAME=HEADING", help=f"The heading of a column: {', '.join(COLUMN_NAMES)}.")
@click.option("--slice", "window", metavar="FROM:TO", help="Only this part of the trace, such as 2h:3h or :30m, from its first request on.")
@click.option("--sample", type=click.FloatRange(0, 1, min_open=True), help="Only this part of the requests, chosen by the seed.")
@click.option("--context", "context_tokens", type=click.IntRange(2), help="Context length.  [default: LMAAS_ENGINE_MAX_MODEL_LEN]")
@click.option("--chart", "charts", multiple=True, type=FILE, help="Draw a chart into this file: .png, .svg or .html. May be repeated.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(["always-on", "scale-to-zero", "shared"]),
    help="Only this arrangement; may be repeated.",
)
@click.option("--profile", type=FILE, help="Measured times of an engine (JSON).")
@click.option("--start-s", type=click.FloatRange(0), help="Seconds from an engine's launch to its first token.")
@click.option("--slots", type=click.IntRange(1), help="Sequences that an engine runs at once.  [default: LMAAS_ENGINE_MAX_NUM_SEQS]")
@click.option("--idle-timeout-s", type=click.FloatRange(0), help="Idle time before an engine stops.  [default: LMAAS_IDLE_TIMEOUT_S]")
@click.option("--max-replicas", type=click.IntRange(1), default=8, show_default=True, help="The most engines of the shared pool.")
@click.option("--engine-price", type=PRICE, default="0.4", show_default=True, help="Dollars per hour of an engine.")
@click.make_pass_decorator(Context)
def simulate(
    context: Context,
    trace: Path | None,
    generated: Path | None,
    seed: int,
    tenants: int,
    adapters: int,
    bursts: float,
    named: tuple[str, ...],
    window: str | None,
    sample: float | None,
    context_tokens: int | None,
    charts: tuple[Path, ...],
    only: tuple[str, ...],
    profile: Path | None,
    start_s: float | None,
    slots: int | None,
    idle_timeout_s: float | None,
    max_replicas: int,
    engine_price: int,
) -> None:
    """Compute the cost of TRACE with an engine for each tenant, always on or scaled to zero, and with shared engines.

    TRACE is a CSV file with a header and the columns time (seconds or ISO 8601), tenant, adapter (empty: the base model), prompt_tokens and
    completion_tokens, or a file with such a JSON object in each line. The public traces of Azure, BurstGPT and Mooncake are recognised;
    their requests are assigned to tenants by the seed.
    See docs/how-to/simulation.md.
    """
    from rich.console import Console

    from lmaas.simulation.generate import Day

    console = Console(stderr=True, quiet=context.as_json)
    if generated is not None:
        _generate(generated, Day(seed=seed, tenants=tenants, adapters=adapters, bursts=bursts), console)
    if trace is None:
        if generated is None:
            raise click.UsageError("Give a TRACE, or --generate one.")
        return
    from lmaas.simulation.chart import check_chart, write_chart
    from lmaas.simulation.queue import server
    from lmaas.simulation.reading import Assignment, read_trace
    from lmaas.simulation.replay import Arrangement, Options, replay
    from lmaas.simulation.report import COLUMNS, rows, warnings

    for chart in charts:
        check_chart(chart)
    begin_s, end_s = _window(window)
    requests = read_trace(trace, _columns(named), Assignment(tenants, adapters, seed))
    if window is not None:
        requests = requests.part(begin_s, end_s)
    if sample is not None:
        requests = requests.sample(sample, seed)
    requests = requests.within(context_tokens or context.settings.engine_max_model_len)
    options = Options(
        profile=_profile(context, profile, start_s, slots),
        idle_timeout_s=context.settings.idle_timeout_s if idle_timeout_s is None else idle_timeout_s,
        max_replicas=max_replicas,
        max_queued=context.settings.pool_max_queued,
        deadline_s=context.settings.queue_deadline_s,
        engine_price=engine_price,
    )
    title = _title(requests)
    notes = [f"{title}.", *requests.remarks, *_said(options.profile, options.idle_timeout_s, engine_price)]
    for note in notes:
        console.print(note, highlight=False)
    results = []
    with server() as redis:
        for arrangement in Arrangement:
            if not only or str(arrangement).split(" ", maxsplit=1)[0] in only:
                with count_bar(context, str(arrangement)) as bar:
                    results.append(replay(requests, arrangement, options, redis, _shown_by(bar, str(arrangement), len(requests))))
    shown = rows(results)
    context.show(shown, [name for name in COLUMNS if any(line[name] is not None for line in shown)])
    warned = warnings(results, max_replicas, options.deadline_s)
    for warning in warned:
        console.print(f"Warning: {warning}", style="yellow", highlight=False)
    for chart in charts:
        write_chart(results, chart, title, notes, warned)
        console.print(f"Written to {chart}")


def _generate(path: Path, day: Day, console: Console) -> None:
    from lmaas.simulation.generate import generate
    from lmaas.simulation.trace import write_trace

    made = generate(day)
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            write_trace(made, file)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}.") from error
    console.print(f"{_title(made)}: written to {path}", highlight=False)


def _shown_by(bar: Callable[[str, int, int | None], None], name: str, total: int) -> Callable[[int], None]:
    """Return a function that shows a number of requests on the bar."""
    return lambda count: bar(name, count, total)


def _window(text: str | None) -> tuple[float, float]:
    """Return the beginning and the end of a slice, in seconds after the first request."""
    if text is None:
        return 0.0, math.inf
    begin, colon, end = text.partition(":")
    try:
        found = _seconds(begin) if begin else 0.0, _seconds(end) if end else math.inf
    except (ValueError, KeyError):
        colon = ""
    if not colon or not found[0] < found[1]:
        raise click.BadParameter(
            f"{text!r} is not FROM:TO with times such as 90, 30m, 2h or 1d, the first before the second.", param_hint="--slice"
        )
    return found


def _seconds(text: str) -> float:
    number = text.rstrip("smhd")
    return float(number) * UNITS_S[text[len(number) :]]


def _columns(named: tuple[str, ...]) -> Columns | None:
    from lmaas.simulation.reading import Columns

    if not named:
        return None
    given: dict[str, Any] = {}
    for pair in named:
        name, equals, heading = pair.partition("=")
        if name not in COLUMN_NAMES or not equals:
            raise click.BadParameter(f"{pair!r} is not NAME=HEADING with one of {', '.join(COLUMN_NAMES)}.", param_hint="--column")
        given[name] = heading
    columns = replace(Columns(), **given)
    # An empty heading: there is no such column, and the seed chooses the tenant or the adapter.
    return replace(columns, tenant=columns.tenant or None, adapter=columns.adapter or None)


def _profile(context: Context, path: Path | None, start_s: float | None, slots: int | None) -> Profile:
    from lmaas.simulation.profile import Profile, read_profile

    settings = context.settings
    if path is not None:
        profile = read_profile(path)
    else:
        profile = Profile(
            slots=settings.engine_max_num_seqs,
            adapter_slots=settings.engine_max_loras,
            adapters_resident=max(settings.engine_max_loras, settings.engine_max_cpu_loras),
        )
    given: dict[str, Any] = {}
    if start_s is not None:
        given["start_s"] = start_s
    if slots is not None:
        given["slots"] = slots
    return replace(profile, **given)


def _title(trace: Trace) -> str:
    prompt, completion = trace.tokens
    hours, minutes = divmod(round(trace.span_s / 60), 60)
    span = f"{hours} h {minutes:02} min" if hours else f"{trace.span_s:.0f} s"
    adapters = f" and {trace.adapters:,} adapters" if trace.adapters else ""
    return f"{len(trace):,} requests of {len(trace.tenants):,} tenants{adapters} in {span}, {prompt:,} + {completion:,} tokens"


def _said(profile: Profile, idle_timeout_s: float, engine_price: int) -> list[str]:
    """Return lines that describe the assumptions."""
    return [
        f"Engines: start {profile.start_s:g} s, a step {profile.step_s * 1000:g} ms + {profile.step_sequence_s * 1000:g} ms per sequence,"
        f" prefill {profile.prefill_tokens_per_s:,.0f} tok/s, {profile.slots} sequences, {profile.adapter_slots} adapters at once,"
        f" idle timeout {idle_timeout_s:g} s, ${engine_price / 1e6:g} per engine-hour."
    ]
