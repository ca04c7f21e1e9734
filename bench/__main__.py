"""Measures all bars, or those that are named: `python -m bench [BAR …]`. Fails if a bar could not be measured, not if its value is too
low."""

import asyncio
import signal
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console

from bench import (
    background,
    batch_cost,
    bill,
    cold,
    console,
    embedding,
    fairness,
    fleet,
    frame,
    gateway,
    grammars,
    lora,
    protocols,
    reports,
    rest,
    serving,
    tenancy,
    wakes,
)
from bench.frame import Bar
from lmaas.config import Settings
from lmaas.up.bootstrap import prepare_default_model

RESULTS = Path(__file__).parent / "results.json"
GROUPS = (
    gateway,
    protocols,
    grammars,
    rest,
    reports,
    console,
    tenancy,
    fleet,
    serving,
    background,
    embedding,
    fairness,
    lora,
    cold,
    bill,
    wakes,
    batch_cost,
)


@click.command(help=__doc__)
@click.argument("bars", nargs=-1)
def main(bars: tuple[str, ...]) -> None:
    names = [name for group in GROUPS for name in group.NAMES]
    if unknown := set(bars) - set(names):
        raise click.UsageError(f"no such bar: {', '.join(sorted(unknown))}. There are: {', '.join(names)}")
    out = Console(stderr=True)
    model = prepare_default_model(Settings(), out)
    measured = asyncio.run(_measure(model, bars or tuple(names), out))
    Console().print(frame.table(measured))
    out.print(f"Written to {RESULTS}")
    sys.exit(any(bar.value is None for bar in measured))


async def _measure(model: Path, wanted: tuple[str, ...], out: Console) -> list[Bar]:
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # servers are stopped as after Ctrl-C
    measured: list[Bar] = []

    def add(bar: Bar) -> None:
        out.log(f"{bar.name}: {bar.detail['why'] if bar.value is None else round(bar.value, 3)}")
        measured.append(bar)
        frame.write(measured, RESULTS)  # written after each bar, because measuring all takes long

    for group in GROUPS:
        mine = [name for name in group.NAMES if name in wanted]
        why = "it was not reached"
        with tempfile.TemporaryDirectory(prefix="lmaas-bench-") as folder:
            try:
                async for bar in group.measure(model, Path(folder), mine, out.log):
                    add(bar)
            except Exception as error:  # noqa: BLE001 (the other groups' bars can still be measured)
                out.print_exception()
                why = f"{type(error).__name__}: {error}"
        for name in mine:
            if name not in {bar.name for bar in measured}:
                add(Bar(name, None, ">=", None, {"why": why}))
    return measured


if __name__ == "__main__":
    main()
