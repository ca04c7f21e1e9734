"""Prints the cost of one call for a Valkey server with a fleet: `python -m bench.fleet --replicas N --resident K`.

All figures are microseconds of the server's CPU, the median of some windows, except the last ones: milliseconds inside the server of the
longest call when a replica ends with its running tickets.
"""

import asyncio
import tempfile
from pathlib import Path
from statistics import median

import click

from bench.fleet import fleets
from bench.fleet.names import Sizes

ROUNDS = 3


@click.command(help=__doc__)
@click.option("--replicas", default=1000, type=click.IntRange(min=1), show_default=True, help="Replicas, in all pools together.")
@click.option("--resident", default=64, type=click.IntRange(min=1), show_default=True, help="Resident adapters of each replica.")
@click.option("--pools", default=1, show_default=True, help="Pools.")
@click.option("--running", default=None, type=int, help="Tickets that run all the time. The default is half of the slots.")
@click.option("--slots", default=16, show_default=True, help="Sequence slots of each replica.")
@click.option("--waiting", default=1000, show_default=True, help="Tickets that wait in the full pool. 0 skips that measurement.")
@click.option("--at-once", default=4, show_default=True, help="Requests that are sent together.")
def main(replicas: int, resident: int, pools: int, running: int | None, slots: int, waiting: int, at_once: int) -> None:
    sizes = Sizes(replicas, resident, pools, replicas * slots // 2 if running is None else running, slots, waiting, at_once)
    for what, figure in asyncio.run(_measure(sizes)).items():
        click.echo(f"{figure:12,.1f}  {what}")


async def _measure(sizes: Sizes) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="lmaas-fleet-") as folder:
        async with fleets(Path(folder) / "valkey", fleet=sizes) as made:
            fleet = made["fleet"]
            figures: dict[str, list[float]] = {}

            async def add(what: str, figure: float) -> None:
                figures.setdefault(what, []).append(figure)
                await fleet.live()

            for _ in range(ROUNDS):
                await add("µs: heartbeat", await fleet.heartbeats())
                await add("µs: submit, granted at once, and release", await fleet.with_room())
                if sizes.running and sizes.replicas > sizes.pools:
                    await add("ms: the longest call when a replica ends", await fleet.lose_replica())
            if sizes.waiting:
                async with fleet.full() as full:
                    for _ in range(ROUNDS):
                        await add(f"µs: release, grant of the next of {sizes.waiting} that wait, and submit", await full())
    return {what: median(each) for what, each in figures.items()}


if __name__ == "__main__":
    main()
