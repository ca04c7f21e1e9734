"""Measures this machine's engines for `lmaas simulate --profile`, and checks the accuracy: `python -m bench.bill PROFILE.json`."""

import asyncio
import json
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console

from bench.bill import check, measured
from lmaas.config import Settings
from lmaas.simulation.profile import read_profile, write_profile
from lmaas.simulation.replay import Arrangement
from lmaas.up.bootstrap import prepare_default_model

ARRANGEMENTS = {"shared": Arrangement.SHARED, "scale-to-zero": Arrangement.SCALE_TO_ZERO}


@click.command(help=__doc__)
@click.argument("profile", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--check", "checked", multiple=True, type=click.Choice(list(ARRANGEMENTS)), help="Replay a short trace on real engines.")
@click.option("--keep", is_flag=True, help="Take the profile that is there, do not measure it again.")
def main(profile: Path, checked: tuple[str, ...], keep: bool) -> None:
    console = Console(stderr=True)
    model = prepare_default_model(Settings(), console)
    with tempfile.TemporaryDirectory(prefix="lmaas-bench-") as folder:
        if not keep:
            write_profile(asyncio.run(measured(model, Path(folder) / "fit", console.log)), profile)
        for name in checked:
            found = asyncio.run(check(model, Path(folder) / name, read_profile(profile), ARRANGEMENTS[name], console.log))
            sys.stdout.write(json.dumps({name: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
