"""Commands about base models and their pools."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from lmaas.api import table
from lmaas.cli.context import Context, confirm, pass_context, yes_option
from lmaas.cli.money import PRICE
from lmaas.cli.names import BASE_MODELS
from lmaas.cli.tables import plain
from lmaas.states import PoolKind

PRICES = ("prompt_price", "cached_price", "completion_price", "engine_price")
#: The most important first: on a narrow terminal the last ones are left out.
MODEL = (
    *("name", "desired", "ready", "min_replicas", "max_replicas", "idle_timeout_s", "kind", "dtype", "cpus", "accelerators", *PRICES),
    *("max_num_seqs", "max_loras", "max_lora_rank", "source"),
)
EMPTY = "There are no base models. Add one: lmaas model add NAME SOURCE"
ENGINE = ("dtype", "max_model_len", "max_num_seqs", "max_loras", "max_cpu_loras", "max_lora_rank", "kv_cache_bytes", "engine_args")

UNDECIDED = "the controller has not decided yet"

Command = TypeVar("Command", bound=Callable[..., None])
OPTIONS: tuple[tuple[str, type | click.ParamType[int], str], ...] = (
    ("--min-replicas", int, "Replicas that run even without requests."),
    ("--max-replicas", int, "The most replicas of the pool."),
    ("--cpus", float, "CPUs that a replica takes from its machine."),
    ("--accelerators", int, "Accelerators that a replica takes. By default one where the machines have any."),
    ("--idle-timeout-s", float, "How long an idle pool keeps its last replica at most."),
    ("--max-loras", int, "Different adapters that an engine runs at the same time."),
    ("--max-cpu-loras", int, "Adapters in an engine's memory, at least as many as run at the same time."),
    ("--max-lora-rank", int, "The highest rank of an adapter."),
    ("--max-num-seqs", int, "Sequences that an engine runs at once."),
    ("--max-model-len", int, "Context, in tokens."),
    ("--kv-cache-bytes", int, "Memory of an engine for the context of running sequences."),
    ("--dtype", str, "float32, bfloat16, float16 or auto."),
    ("--engine-args", str, "More arguments for the engine, in one text."),
    ("--prompt-price", PRICE, "Dollars per million prompt tokens, such as 0.15."),
    ("--cached-price", PRICE, "Dollars per million prompt tokens that were in the engine's prefix cache."),
    ("--completion-price", PRICE, "Dollars per million completion tokens."),
    ("--engine-price", PRICE, "Cost of an engine in dollars per hour."),
)


def model_options(command: Command) -> Command:
    """Add the options for a base model's values."""
    for option, kind, text in reversed(OPTIONS):
        command = click.option(option, type=kind, help=text)(command)
    return command


@click.group()
def model() -> None:
    """Manage base models and their pools."""


@model.command("list")
@pass_context
def model_list(context: Context) -> None:
    """List the base models."""
    rows = context.client().items(table.LIST_MODELS)
    context.show([_flat(row) for row in rows], MODEL, EMPTY)
    if not context.as_json:
        for line in troubles(rows):
            context.say(line)


@model.command("show")
@click.argument("name", shell_complete=BASE_MODELS)
@pass_context
def model_show(context: Context, name: str) -> None:
    """Show how a base model is run, what its pool does now, and why."""
    row = context.client().send(table.GET_MODEL, model=name)
    if context.as_json:
        context.show_one(row, ())
        return
    context.show_one(_flat(row), MODEL)
    pool = row["pool"]
    running = ", ".join(f"{pool[state]} {state}" for state in ("ready", "starting", "draining") if pool[state]) or "no replica"
    click.echo()
    context.show_texts(
        {
            "engine": ", ".join(f"{field} {row[field]}" for field in ENGINE if row[field] != ""),
            "pool": f"{running}; wanted {pool['wanted']}: {plain(pool['reason'] or UNDECIDED)}",
            "when idle": _idle_words(pool["keep_warm"]),
            "background": _background_words(pool["background"]),
        }
    )
    for line in troubles([row]):
        context.say(line)


@model.command("add")
@click.argument("name")
@click.argument("source")
@click.option("--kind", type=click.Choice([kind.value for kind in PoolKind]), help="By default what the model's files say.")
@model_options
@pass_context
def model_add(context: Context, /, name: str, source: str, **values: Any) -> None:
    """Add a base model NAME. SOURCE is a folder that the gateway and the machines of replicas can read, or a name on a hub."""
    if Path(source).is_dir():
        source = str(Path(source).resolve())
    body = {"name": name, "source": source} | _given(values)
    context.show_one(_flat(context.client().send(table.CREATE_MODEL, body)), MODEL)


@model.command("change")
@click.argument("name", shell_complete=BASE_MODELS)
@click.option("--source", help="Another source. Only while there are neither adapters nor replicas, as for --dtype and --max-lora-rank.")
@model_options
@pass_context
def model_change(context: Context, /, name: str, **values: Any) -> None:
    """Change values of a base model. Those of engines hold for replicas that start from now on."""
    if not (body := _given(values)):
        raise click.UsageError("Give at least one option that says what to change; --help lists them.")
    context.show_one(_flat(context.client().send(table.CHANGE_MODEL, body, model=name)), MODEL)


@model.command("delete")
@click.argument("name", shell_complete=BASE_MODELS)
@yes_option
@pass_context
def model_delete(context: Context, name: str, yes: bool) -> None:
    """Delete a base model that has neither adapters nor replicas. Its costs stay, for the bill."""
    confirm(f"Delete the base model '{name}'? Clients can no longer call it.", yes=yes)
    context.show_done(context.client().send(table.DELETE_MODEL, model=name), f"The base model '{name}' is deleted.")


def troubles(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each pool whose starts fail or that waits for a machine."""
    lines = []
    for row in rows:
        pool = row["pool"]
        failed = pool["failed_starts"]
        if failed is not None:
            times = "The last start" if failed["count"] == 1 else f"The last {failed['count']} starts"
            lines.append(f"{row['name']}: {times} failed; the next may come in {failed['next_try_s']:.0f} s. Reason: {failed['reason']}")
        if pool["waits_for_machine"]:
            lines.append(f"{row['name']}: waits for a machine. {pool['reason']}")
    return lines


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return row | {name: row["pool"][name] for name in ("desired", "ready")}


def _idle_words(plan: dict[str, Any]) -> str:
    """Describe the time for which an idle pool stays warm, and its cost."""
    if plan["until_s"] is None:
        return UNDECIDED
    words = f"warm until {plan['until_s']:.0f} s after the last request"
    if plan["again_from_s"] is not None:
        words += f", and again from {plan['again_from_s']:.0f} to {plan['again_until_s']:.0f} s"
    words += f", at {plan['cost_per_hour_microusd'] / 1e6:.6f} $ an hour"
    if plan["engine_s_per_idle_time"] is None:
        return words + " (the idle timeout: there is too little history)"
    return (
        f"{words}; by its last {plan['idle_times_seen']:.0f} idle times that is {plan['engine_s_per_idle_time']:.0f} engine-seconds "
        f"({plan['cost_per_idle_time_microusd'] / 1e6:.6f} $) each, and {100 * plan['cold_share']:.0f} % of them end in a cold start"
    )


def _background_words(work: dict[str, Any]) -> str:
    """Describe the waiting and the running background work, and the slots that were taken back from it."""
    words = f"{work['running']} slots are in use, {work['reserve']} are kept free for requests; {work['lines']:,} lines wait"
    if work["due_s"] is not None:
        words += f" ({work['tokens']:,} tokens), the first until {work['due_s'] / 3600:.1f} h from now"
    if work["tokens_per_s"] is not None:
        words += f"; a replica processes {work['tokens_per_s']:,.0f} tokens a second"
    return f"{words}; a slot was taken back {work['put_back']:,} times"


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
