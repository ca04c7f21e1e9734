"""`lmaas simulate` as a user runs it, and its charts."""

import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lmaas.simulation.profile import Profile, write_profile
from tests.support.command import SMALL_TRACE, run


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(SMALL_TRACE)
    return path


def test_a_table_for_people_has_all_three_arrangements(trace: Path) -> None:
    done = run("simulate", trace)
    assert done.exit_code == 0, done.output
    for words in ("always-on per tenant", "scale-to-zero per tenant", "shared", "ttft p99", "cold requests", "cost $"):
        assert words in done.stdout
    assert "3 requests of 2 tenants and 1 adapters in 900 s, 250 + 50 tokens." in done.stderr


def test_json_for_programs_has_all_figures(trace: Path) -> None:
    done = run("--json", "simulate", trace, "--idle-timeout-s", "60", "--engine-price", "3.6")
    always, zero, shared = json.loads(done.stdout)
    assert always["engine_s"] == pytest.approx(2 * 900, rel=0.01)
    assert always["cost_microusd"] == pytest.approx(2 * 900 * 1000, rel=0.01)
    # Starts, runs and idle timeouts: three for tenants of their own, two together.
    assert zero["engine_s"] == pytest.approx(3 * 65, rel=0.03)
    assert shared["engine_s"] == pytest.approx(2 * 65, rel=0.03)
    assert (always["starts"], zero["starts"], shared["starts"]) == (0, 3, 2)
    assert always["ttft_p50_s"] < 0.2 < shared["ttft_p50_s"]
    assert shared["of_always_on"] == pytest.approx(shared["engine_s"] / always["engine_s"], abs=1e-4)
    assert {line["completed"] for line in (always, zero, shared)} == {3}


def test_some_arrangements_only(trace: Path) -> None:
    [shared] = json.loads(run("--json", "simulate", trace, "--only", "shared").stdout)
    assert (shared["arrangement"], shared["of_always_on"]) == ("shared", None)


def test_options_change_the_engine(trace: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    write_profile(Profile(start_s=30.0, step_s=0.5), profile)
    [slow] = json.loads(run("--json", "simulate", trace, "--only", "shared", "--profile", profile).stdout)
    assert slow["ttft_p50_s"] > 30
    [fast] = json.loads(run("--json", "simulate", trace, "--only", "shared", "--profile", profile, "--start-s", "0.5").stdout)
    assert 0.5 < fast["ttft_p50_s"] < 4


def test_a_day_is_written_and_simulated(tmp_path: Path) -> None:
    day = tmp_path / "day.csv"
    options = ("--seed", "3", "--bursts", "5", "--tenants", "4")
    assert run("simulate", "--generate", day, *options).exit_code == 0
    first = day.read_text()
    assert first.startswith("time,tenant,adapter,prompt_tokens,completion_tokens\n0.000,tenant-")
    assert run("simulate", "--generate", day, *options).exit_code == 0
    assert day.read_text() == first
    [shared] = json.loads(run("--json", "simulate", day, "--only", "shared").stdout)
    assert shared["completed"] == len(first.splitlines()) - 1


def test_an_azure_trace_needs_no_options(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n")
    [shared] = json.loads(run("--json", "simulate", path, "--only", "shared", "--tenants", "3").stdout)
    assert (shared["prompt_tokens"], shared["completion_tokens"]) == (770, 153)


def test_columns_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("at,in,out\n1,10,5\n")
    named = [
        part for name in ("time=at", "prompt_tokens=in", "completion_tokens=out", "tenant=", "adapter=") for part in ("--column", name)
    ]
    [shared] = json.loads(run("--json", "simulate", path, "--only", "shared", *named).stdout)
    assert shared["completed"] == 1


def test_a_part_of_a_trace_that_is_too_much_is_simulated_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "burst.jsonl"
    lines = [{"timestamp": number, "input_length": 5000 if number == 150 else 1500, "output_length": 900} for number in range(800)]
    path.write_text("\n".join(map(json.dumps, lines)))
    page = tmp_path / "page.html"
    options = ("--slice", "0.1s:", "--context", "2048", "--max-replicas", "1", "--tenants", "1", "--chart", page)
    done = run("simulate", path, *options)
    assert done.exit_code == 0, done.output
    assert "699 requests of 1 tenants" in done.stderr
    assert "1 requests are left out: their prompts do not fit a context of 2,048 tokens." in done.stderr
    assert "Warning: shared:" in done.stderr
    text = page.read_text()
    for words in ("had no answer within 300 s", "given up after waiting too long", "refused because the queue was full"):
        assert words in text


def test_charts_are_written(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    png, svg, page = (tmp_path / f"chart.{kind}" for kind in ("png", "svg", "html"))
    done = run("simulate", trace, *(part for path in (png, svg, page) for part in ("--chart", path)))
    assert done.exit_code == 0, done.output
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    assert (width, height) == (1650, 1080)
    assert svg.read_text().rstrip().endswith("</svg>")
    _looks_right(page.read_text())


def _looks_right(text: str) -> None:
    """Check that a page is complete, names its charts, and loads nothing from other servers."""

    class Page(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.seen: set[str] = set()

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.seen.add(tag)
            if tag != "meta":
                self.open.append(tag)
            for name, value in attrs:
                assert name not in ("src", "onload"), (tag, name, value)
                assert not name.endswith("href") or str(value).startswith("#"), (tag, name, value)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    page = Page()
    page.feed(text)
    assert page.open == []
    assert {"svg", "table", "h1", "li"} <= page.seen
    assert not re.search(r"<script|@import|url\((?!#)", text)
    for words in ("3 requests of 2 tenants", "scale-to-zero per tenant", "TTFT p99, s", "idle timeout 300 s"):
        assert words in text
