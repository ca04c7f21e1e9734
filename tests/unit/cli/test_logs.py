"""`lmaas logs`: the formats of the logs, filters, following, rotation, and the command on a folder of logs."""

import json
import time
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from lmaas.cli.commands import cli
from lmaas.cli.log_files import LogFile, LogFolder
from lmaas.cli.log_lines import Filter, LogLine, as_json, read_line, shown

NOON = datetime(2026, 11, 30, 12, 0, 0, tzinfo=UTC).timestamp()
REPLICA = "rep_0123456789abcdef0123"
STRUCTURED = json.dumps({
    "time": "2026-11-30T12:00:00.250Z", "level": "WARNING", "logger": "lmaas.web", "message": "it failed", "request_id": "req_1",
    "replica_id": REPLICA, "exception": "Traceback:\n  line",
})  # fmt: skip


def local(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%d %H:%M:%S"))


@pytest.mark.parametrize(
    ("text", "at", "level", "words"),
    [
        (STRUCTURED, NOON + 0.25, "WARNING", "it failed"),
        ("2026-11-30 12:00:00.500 UTC [19358] LOG:  checkpoint", NOON + 0.5, "INFO", "checkpoint"),
        ("2026-11-30 12:00:00.500 UTC [19358] FATAL:  no memory", NOON + 0.5, "ERROR", "no memory"),
        ("2026-11-30 12:00:00.500 UTC [19358] PANIC:  no disk", NOON + 0.5, "CRITICAL", "no disk"),
        ("2026-11-30 12:00:00.500 UTC [19358] user@db ERROR:  bad", NOON + 0.5, "ERROR", "bad"),
        ("19353:M 30 Nov 2026 13:22:38.250 * Ready", local("2026-11-30 13:22:38") + 0.25, "INFO", "Ready"),
        ("19353:M 30 Nov 2026 13:22:38.250 # WARNING overcommit", local("2026-11-30 13:22:38") + 0.25, "WARNING", "WARNING overcommit"),
        ("(APIServer pid=3) INFO 11-30 05:47:33 [a.py:3] Engine", local("2026-11-30 05:47:33"), "INFO", "[a.py:3] Engine"),
        ("ERROR 12-31 23:00:00 [a.py:3] late", local("2025-12-31 23:00:00"), "ERROR", "[a.py:3] late"),
        ("INFO:     Shutting down", NOON, "INFO", "Shutting down"),
        ("ValueError: bad", NOON, "INFO", "ValueError: bad"),
        ('{"time": "x", "level": "INFO", "message": 1}', NOON, "INFO", '{"time": "x", "level": "INFO", "message": 1}'),
        ('{"level": "INFO"}', NOON, "INFO", '{"level": "INFO"}'),
        ("{", NOON, "INFO", "{"),
    ],
)
def test_every_format(text: str, at: float, level: str, words: str) -> None:
    line = read_line(text, "engine", None, None, NOON)
    assert (line.at, line.level, line.text) == (at, level, words)


def test_a_line_without_a_time_continues_the_one_before() -> None:
    first = read_line(STRUCTURED, "gateway", None, None, NOON)
    second = read_line("ValueError: bad", "gateway", None, first, NOON + 60)
    assert (second.at, second.level) == (NOON + 0.25, "WARNING")


@pytest.mark.parametrize(
    ("wanted", "takes"),
    [
        (Filter(), True),
        (Filter(level="WARNING"), True),
        (Filter(level="ERROR"), False),
        (Filter(request="req_1"), True),
        (Filter(request="req_2"), False),
    ],
)
def test_filters(wanted: Filter, takes: bool) -> None:
    assert wanted.takes(read_line(STRUCTURED, "gateway", None, None, NOON)) is takes


def test_a_request_is_found_in_the_text_of_an_engine() -> None:
    assert Filter(request="req_7").takes(LogLine(0, "INFO", "engine", REPLICA, "aborted req_7"))


@pytest.mark.parametrize(
    ("processes", "takes"),
    [(set(), True), ({"engine"}, True), ({REPLICA}, True), ({"gateway", "engine"}, True), ({"gateway"}, False), ({"rep_other"}, False)],
)
def test_sources(processes: set[str], takes: bool) -> None:
    assert Filter(frozenset(processes)).takes_source("engine", REPLICA) is takes


def test_a_line_for_people_and_one_for_programs() -> None:
    line = read_line(STRUCTURED, "supervisor", REPLICA, None, NOON)
    text = "12:00:00.250 WARNING  supervisor/012345 it failed request_id=req_1\n    Traceback:\n      line"
    assert shown(line, date(2026, 11, 30)) == text
    assert shown(line, date(2026, 12, 1)) == f"2026-11-30 {text}"
    assert json.loads(as_json(line)) == json.loads(STRUCTURED) | {"process": "supervisor"}
    assert shown(LogLine(NOON, "INFO", "gateway", None, "request", {"code": None, "status": 200}), date(2026, 11, 30)).endswith(
        "request status=200"
    )
    # The controller's lines are about replicas, too.
    assert f"replica_id={REPLICA}" in shown(read_line(STRUCTURED, "controller", None, None, NOON), date(2026, 11, 30))
    assert shown(LogLine(NOON, "INFO", "engine", None, "a\x1b[1m"), date(2026, 11, 30)).endswith(r"a\x1b[1m")


def texts(file: LogFile) -> list[str]:
    return [line.text for line in file.new()]


def test_a_file_is_followed_over_pieces_rotation_and_truncation(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    file = LogFile(path, "engine", REPLICA)
    assert texts(file) == []
    path.write_text("one\ntw")
    assert texts(file) == ["one"]
    with path.open("a") as log:
        log.write("o\n")
    assert texts(file) == ["two"]
    with path.open("a") as log:
        log.write("last of the old\n")
    path.rename(tmp_path / "engine.log.1")
    path.write_text("first of the new\n")
    assert texts(file) == ["last of the old", "first of the new"]
    path.write_text("")
    assert texts(file) == []
    path.write_text("after\n")
    assert texts(file) == ["after"]
    with path.open("a") as log:
        log.write("x" * 200_000 + "\n")
    assert sum(map(len, texts(file))) == 200_000
    path.unlink()
    assert texts(file) == []
    file.close()


def test_the_end_of_a_long_file_is_read_with_its_predecessor(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    (tmp_path / "engine.log.1").write_text("".join(f"old {number}\n" for number in range(1000)))
    path.write_text("".join(f"new {number}\n" for number in range(100_000)))
    file = LogFile(path, "engine", REPLICA)
    last = file.past(Filter(), 3)
    assert [line.text for line in last] == ["new 99997", "new 99998", "new 99999"]
    assert texts(file) == []
    file.close()
    path.write_text("new\n")
    file = LogFile(path, "engine", REPLICA)
    assert [line.text for line in file.past(Filter(), 2)] == ["old 999", "new"]
    file.close()
    # A filter searches all lines.
    assert [line.text for line in LogFile(path, "engine", REPLICA).past(Filter(request="old 7"), 1)] == ["old 799"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with the logs of a gateway and of one replica."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "replicas" / REPLICA).mkdir(parents=True)
    (tmp_path / "logs" / "gateway.log").write_text(STRUCTURED + "\n")
    (tmp_path / "replicas" / REPLICA / "engine.log").write_text("ERROR 11-30 00:00:00 [a.py:3] early\n")
    return tmp_path


def test_logs_are_merged_by_time_and_new_ones_are_found(home: Path) -> None:
    folder = LogFolder(home, Filter())
    assert [line.text for line in folder.past(10)] == ["[a.py:3] early", "it failed"]
    assert folder.new() == []
    other = home / "replicas" / "rep_2"
    other.mkdir()
    (other / "supervisor.log").write_text(STRUCTURED.replace("it failed", "it began") + "\n")
    assert [(line.text, line.replica) for line in folder.new()] == [("it began", "rep_2")]
    (other / "supervisor.log").unlink()
    assert folder.new() == []
    folder.close()


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ([], ["early", "it failed"]),
        (["-n", "1"], ["it failed"]),
        (["-n", "0"], []),
        (["--level", "error"], ["early"]),
        (["-p", "gateway"], ["it failed"]),
        (["-p", REPLICA], ["early"]),
        (["-p", "engine", "-p", "gateway"], ["early", "it failed"]),
        (["--request", "req_1"], ["it failed"]),
        (["-p", "jobs"], []),
    ],
)
def test_the_command(home: Path, options: list[str], lines: list[str]) -> None:
    done = CliRunner().invoke(cli, ["logs", "--no-follow", *options, "--json"], env={"LMAAS_HOME": str(home)})
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["message"].removeprefix("[a.py:3] ") for line in done.output.splitlines()] == lines


def test_an_unknown_process_is_wrong_usage(home: Path) -> None:
    done = CliRunner().invoke(cli, ["logs", "-p", "engin"], env={"LMAAS_HOME": str(home)})
    assert done.exit_code == 2
    assert "There is no log of 'engin'." in done.output


def test_a_home_without_logs_is_an_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["logs"], env={"LMAAS_HOME": str(tmp_path)})
    assert f"There are no logs in {tmp_path}." in str(done.exception)
