"""Compares the gateway's CPU time per request with that of another checkout: `python -m bench.against TREE [PROTOCOL …]`.

Both gateways use the same Postgres, Valkey and engine, which this checkout starts, in the same rounds. Prints the milliseconds of both and
the ratio of this checkout ÷ the other, for whole answers, for streams, and for streams with one token at a time.
"""

import asyncio
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench.frame import interleaved, ratios, summary
from bench.gateways.processes import TREE, Load, Proxy, core_of_its_own, loading
from bench.gateways.protocols import PROTOCOLS
from bench.gateways.service import Service, service
from bench.protocols import cost

KINDS = ("plain", "stream", "paced")
PACED_MS = 5.0


@click.command(help=__doc__)
@click.argument("tree", type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path))
@click.argument("protocols", nargs=-1, type=click.Choice(list(PROTOCOLS)))
@click.option("--rounds", default=40, show_default=True)
@click.option("--seconds", default=0.5, show_default=True, help="The length of a round. Many short ones average other work on the machine.")
@click.option("--kind", "kinds", multiple=True, default=KINDS, type=click.Choice(KINDS), show_default=True)
def main(tree: Path, protocols: tuple[str, ...], rounds: int, seconds: float, kinds: tuple[str, ...]) -> None:
    asyncio.run(_compare(tree, protocols or ("chat",), rounds, seconds, kinds))


async def _compare(tree: Path, protocols: tuple[str, ...], rounds: int, seconds: float, kinds: tuple[str, ...]) -> None:
    console = Console()
    with tempfile.TemporaryDirectory(prefix="lmaas-bench-") as folder:
        async with loading() as load, service(Path(folder)) as ours:
            gateways = {"this": TREE, "other": tree}
            proxies = {name: await ours.gateway(name, "lmaas", "gateway", tree=each) for name, each in gateways.items()}
            for proxy in proxies.values():
                await load.until_right(proxy)
            with core_of_its_own([proxy.running for proxy in proxies.values()]):
                for protocol in protocols:
                    for kind in kinds:
                        found = await _rounds(load, ours, proxies, protocol, kind, rounds, seconds)
                        console.print(f"{protocol}, {kind}: {found}", soft_wrap=True)


async def _rounds(
    load: Load, ours: Service, proxies: dict[str, Proxy], protocol: str, kind: str, rounds: int, seconds: float
) -> dict[str, Any]:
    await ours.pace(PACED_MS if kind == "paced" else 0)
    runs = {name: partial(cost, load, proxy, protocol, stream=kind != "plain", seconds=seconds) for name, proxy in proxies.items()}
    await interleaved(1, runs)  # opens connections and fills caches
    figures = await interleaved(rounds, runs)
    found = summary(ratios(figures["this"], figures["other"]))
    medians = {name: round(summary(each)["median"], 4) for name, each in figures.items()}
    best = {name: round(summary(each)["min"], 4) for name, each in figures.items()}
    return {"this ÷ other": {name: round(value, 3) for name, value in found.items()}, "cpu ms": medians, "least": best}


if __name__ == "__main__":
    main()
