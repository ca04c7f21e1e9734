"""The refusals of `lmaas simulate` before it starts a server, and its profiles."""

from pathlib import Path

import pytest

from lmaas.errors import SettingsError
from lmaas.simulation.chart import check_chart
from lmaas.simulation.profile import Profile, read_profile, write_profile
from lmaas.simulation.replay import Arrangement, Result
from lmaas.simulation.report import warnings
from lmaas.simulation.tally import Tally
from lmaas.simulation.trace import TraceError
from tests.support.command import SMALL_TRACE, run


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(SMALL_TRACE)
    return path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Give a TRACE"),
        (("--column", "when=at"), "is not NAME=HEADING"),
        (("--slots", "0"), "--slots"),
        (("--only", "none"), "--only"),
        (("--slice", "2h"), "is not FROM:TO"),
        (("--slice", "2h:1h"), "the first before the second"),
        (("--slice", "1w:2w"), "is not FROM:TO"),
        (("--slice", "nan:2"), "is not FROM:TO"),
        (("--sample", "0"), "--sample"),
        (("--context", "1"), "--context"),
    ],
)
def test_wrong_options_are_explained(trace: Path, arguments: tuple[str, ...], says: str) -> None:
    done = run("simulate", *([trace] if arguments else []), *arguments)
    assert done.exit_code == 2
    assert says in done.output


def test_a_wrong_trace_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "wrong.csv"
    path.write_text(SMALL_TRACE + "901,acme,bot,-1,5\n")
    assert isinstance(run("simulate", path).exception, TraceError)


def test_a_chart_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"end in \.png, \.svg, \.html"):
        check_chart(tmp_path / "chart.gif")
    with pytest.raises(SettingsError, match="its folder does not exist"):
        check_chart(tmp_path / "none" / "chart.png")
    monkeypatch.setattr("lmaas.simulation.chart.find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"pip install 'lmaas\[chart\]'"):
        check_chart(tmp_path / "chart.png")


def test_a_profile_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile = Profile(start_s=18.0, slots=32)
    write_profile(profile, path)
    assert read_profile(path) == profile
    path.write_text('{"start_s": 3}')
    assert read_profile(path) == Profile(start_s=3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"unknown": 1}',
        '{"start_s": -1}',
        '{"start_s": "fast"}',
        '{"step_s": 0}',
        '{"slots": 1.5}',
        '{"slots": true}',
        '{"step_s": NaN}',
    ],
)
def test_a_profile_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(SettingsError, match="profile"):
        read_profile(path)


def test_a_report_warns_when_a_tenth_of_the_requests_had_no_answer() -> None:
    def result(arrangement: Arrangement, completed: int, expired: int, refused: int) -> Result:
        return Result(arrangement, Tally(completed=completed, expired=expired, refused=refused), 1, [])

    fine = result(Arrangement.SCALE_TO_ZERO, 91, 5, 4)
    assert warnings([fine, result(Arrangement.SHARED, 0, 0, 0)], 8, 300) == []
    [always, shared] = warnings([result(Arrangement.ALWAYS_ON, 90, 5, 5), fine, result(Arrangement.SHARED, 500, 500, 0)], 8, 300)
    assert "always-on per tenant: 10 of 100 requests (10.0%) had no answer within 300 s, because one engine for each tenant" in always
    assert "shared: 500 of 1,000 requests (50.0%)" in shared
    assert "Raise --max-replicas" in shared
