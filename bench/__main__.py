"""`python -m bench [BAR …]`: measure all bars, or those named."""

import asyncio
import tempfile
from pathlib import Path

import click
from rich.console import Console

from bench import frame, lora
from bench.frame import Bar
from lmaas.config import Settings
from lmaas.up.bootstrap import prepare_default_model

RESULTS = Path(__file__).parent / "results.json"
GROUPS = (lora,)


@click.command(help=__doc__)
@click.argument("bars", nargs=-1)
def main(bars: tuple[str, ...]) -> None:
    names = [name for group in GROUPS for name in group.NAMES]
    if unknown := set(bars) - set(names):
        raise click.UsageError(f"no such bar: {', '.join(sorted(unknown))}. There are: {', '.join(names)}")
    console = Console(stderr=True)
    model = prepare_default_model(Settings(), console)
    measured = asyncio.run(_measure(model, bars or tuple(names), console))
    frame.write(measured, RESULTS)
    Console().print(frame.table(measured))
    console.print(f"Written to {RESULTS}")


async def _measure(model: Path, wanted: tuple[str, ...], console: Console) -> list[Bar]:
    measured: list[Bar] = []
    for group in GROUPS:
        mine = [name for name in group.NAMES if name in wanted]
        with tempfile.TemporaryDirectory(prefix="lmaas-bench-") as folder:
            why = ""
            try:
                async for bar in group.measure(model, Path(folder), mine, console.log):
                    console.log(f"{bar.name}: {bar.value:.3g}")
                    measured.append(bar)
            except Exception as error:  # noqa: BLE001 (a bar that cannot be measured must not take the others' results away)
                console.print_exception()
                why = f"{type(error).__name__}: {error}"
        missing = [name for name in mine if name not in {bar.name for bar in measured}]
        measured += [Bar(name, None, "=", None, {"why": why}) for name in missing]
    return measured


if __name__ == "__main__":
    main()
