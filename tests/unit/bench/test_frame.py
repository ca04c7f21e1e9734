"""The common parts of the bars: fair rounds, verdicts, and the format of the results."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from bench import frame
from bench.frame import Bar


async def test_rounds_are_interleaved_and_no_run_is_always_first() -> None:
    order: list[tuple[str, int]] = []

    def run(name: str) -> frame.Run[float]:
        async def measured(number: int) -> float:
            order.append((name, number))
            return float(number)

        return measured

    figures = await frame.interleaved(3, {name: run(name) for name in "abc"}, first=2)
    assert order == [(name, number) for number, names in ((2, "cab"), (3, "abc"), (4, "bca")) for name in names]
    assert figures == {name: [2.0, 3.0, 4.0] for name in "abc"}


def test_ratios_are_of_the_same_round() -> None:
    assert frame.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert frame.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "rounds": 3}


@pytest.mark.parametrize(
    ("value", "op", "bar", "holds"),
    [
        (1.8, ">=", 1.8, True), (1.79, ">=", 1.8, False), (0.9, "<=", 1, True), (1.1, "<=", 1, False),
        (1, "=", 1, True), (0.999, "=", 1, False), (None, ">=", 1, None), (5, ">=", None, None),
    ],
)  # fmt: skip
def test_verdicts(value: float | None, op: frame.Op, bar: float | None, holds: bool | None) -> None:
    assert Bar("a_bar", value, op, bar).holds is holds


async def test_what_could_not_be_measured_is_told() -> None:
    async def fails() -> Bar:
        raise RuntimeError("no engine")

    async def works() -> Bar:
        return Bar("a_bar", 2, ">=", 1)

    assert await frame.attempted("a_bar", works()) == Bar("a_bar", 2, ">=", 1)
    failed = await frame.attempted("a_bar", fails())
    assert (failed.value, failed.holds, failed.detail) == (None, None, {"why": "RuntimeError: no engine"})


def test_results_and_table(tmp_path: Path) -> None:
    bars = [Bar("fast", 1.9, ">=", 1.8, {"min": 1.7, "max": 2.0}), Bar("later", None, "<=", 3, {"why": "no network"})]
    frame.write(bars, tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"machine", "commit", "bars"}
    assert results["commit"] == frame.commit()
    fast, later = results["bars"]
    shown = {"name": "fast", "value": 1.9, "op": ">=", "bar": 1.8, "holds": True, "detail": {"min": 1.7, "max": 2.0}}
    assert fast == shown | {"commit": frame.commit()}
    assert (later["value"], later["holds"], later["detail"]) == (None, None, {"why": "no network"})
    console = Console(record=True, width=120)
    console.print(frame.table(bars))
    text = console.export_text()
    assert "1.7 to 2" in text
    assert "not measured" in text
    assert "no network" in text


def test_bars_of_an_earlier_run_on_the_same_machine_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"

    def written() -> list[tuple[str, float, str]]:
        return [(bar["name"], bar["value"], bar["commit"]) for bar in json.loads(path.read_text())["bars"]]

    monkeypatch.setattr(frame, "commit", lambda: "old")
    frame.write([Bar("a", 1, ">=", 1), Bar("b", 1, ">=", 1)], path)
    monkeypatch.setattr(frame, "commit", lambda: "new")
    frame.write([Bar("b", 2, ">=", 1), Bar("c", 2, ">=", 1)], path)
    assert written() == [("a", 1, "old"), ("b", 2, "new"), ("c", 2, "new")]
    monkeypatch.setattr(frame, "machine", lambda: {"cpu": "another"})
    frame.write([Bar("c", 3, ">=", 1)], path)
    assert written() == [("c", 3, "new")]
