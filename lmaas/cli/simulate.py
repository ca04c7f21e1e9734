"""`lmaas simulate`: what a trace would cost, without an engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmaas.cli.context import Context
from lmaas.cli.money import PRICE
from lmaas.errors import SettingsError

if TYPE_CHECKING:
    from rich.console import Console

    from lmaas.simulation.generate import Day
    from lmaas.simulation.profile import Profile
    from lmaas.simulation.trace import Columns, Trace

COLUMN_NAMES = ("time", "tenant", "adapter", "prompt_tokens", "completion_tokens")
FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("trace", type=FILE, required=False)
@click.option("--generate", "generated", type=FILE, help="Write a generated day with bursts to this file. Without a TRACE, that is all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of a generated day, and of the tenants of a trace without any.")
@click.option("--tenants", type=click.IntRange(1, 100_000), default=50, show_default=True, help="Generated tenants.")
@click.option("--adapters", type=click.IntRange(0, 1000), default=1, show_default=True, help="Adapters of each. 0: the base model.")
@click.option("--bursts", type=click.FloatRange(1), default=1500, show_default=True, help="Bursts of all tenants in a generated day.")
@click.option("--azure", is_flag=True, help="Read the columns of Azure LLM inference traces, which are usually recognised.")
@click.option("--column", "named", multiple=True, metavar="NAME=HEADING", help=f"The heading of a column: {', '.join(COLUMN_NAMES)}.")
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
    azure: bool,
    named: tuple[str, ...],
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
    completion_tokens. It may be an Azure LLM inference trace, whose requests are assigned to tenants by the seed.
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
    from lmaas.simulation.replay import Arrangement, Options, replay
    from lmaas.simulation.report import COLUMNS, rows
    from lmaas.simulation.trace import Assignment, read_trace

    for chart in charts:
        check_chart(chart)
    requests = read_trace(trace, _columns(azure, named), Assignment(tenants, adapters, seed))
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
                with console.status(f"{arrangement} ..."):
                    results.append(replay(requests, arrangement, options, redis))
    shown = rows(results)
    context.show(shown, [name for name in COLUMNS if any(line[name] is not None for line in shown)])
    for chart in charts:
        write_chart(results, chart, title, notes)
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


def _columns(azure: bool, named: tuple[str, ...]) -> Columns | None:
    from lmaas.simulation.trace import AZURE, Columns

    if not named:
        return AZURE if azure else None
    given: dict[str, str] = {}
    for pair in named:
        name, equals, heading = pair.partition("=")
        if name not in COLUMN_NAMES or not equals:
            raise click.BadParameter(f"{pair!r} is not NAME=HEADING with one of {', '.join(COLUMN_NAMES)}.", param_hint="--column")
        given[name] = heading
    columns = replace(AZURE if azure else Columns(), **given)
    # An empty heading: there is no such column, and the seed says who asked.
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
    """Return lines that say what was assumed."""
    return [
        f"Engines: start {profile.start_s:g} s, a step {profile.step_s * 1000:g} ms + {profile.step_sequence_s * 1000:g} ms per sequence,"
        f" prefill {profile.prefill_tokens_per_s:,.0f} tok/s, {profile.slots} sequences, {profile.adapter_slots} adapters at once,"
        f" idle timeout {idle_timeout_s:g} s, ${engine_price / 1e6:g} per engine-hour."
    ]
