"""`lmaas doctor`: the judgement of each fact, the checks of this machine, and the command with its exit code."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lmaas.cli.commands import cli
from lmaas.cli.context import Context
from lmaas.cli.doctor import findings, machine, service
from lmaas.cli.doctor.findings import GIB, MIB, Finding, Level
from lmaas.config import Settings
from tests.support.foreign_server import serving

OK, WARNING, WRONG = Level.OK, Level.WARNING, Level.WRONG


@pytest.mark.parametrize(
    ("finding", "level", "says"),
    [
        (findings.judge_disk("home", "/x", 50 * GIB, None), OK, "50.0 GiB are free on the disk of /x."),
        (findings.judge_disk("home", "/x", 2 * GIB, 10**6), WARNING, "2.0 GiB are free"),
        (findings.judge_disk("home", "/x", 3 * MIB, None), WRONG, "3 MiB are free"),
        (findings.judge_disk("home", "/x", 50 * GIB, 7), WRONG, "can take only 7 more files"),
        (findings.judge_memory(8 * GIB, 16 * GIB, GIB, is_running=False), OK, "8.0 GiB of 16.0 GiB are available."),
        (findings.judge_memory(2 * GIB, 16 * GIB, GIB, is_running=False), WARNING, "needs about 3.0 GiB"),
        (findings.judge_memory(2 * GIB, 16 * GIB, GIB, is_running=True), OK, "2.0 GiB"),
        (findings.judge_memory(100 * MIB, 16 * GIB, GIB, is_running=True), WRONG, "100 MiB of 16.0 GiB"),
        (findings.judge_files(10**6, 16_384), OK, "1,000,000 files"),
        (findings.judge_files(20_000, 16_384), WARNING, "takes 10,000 connections, not 16,384"),
        (findings.judge_files(256, 16_384), WRONG, "256 files"),
        (findings.judge_clock("clock", "the service", 0.9), OK, "agrees with that of the service"),
        (findings.judge_clock("clock", "the service", -3.2), WARNING, "3 s ahead of that of the service"),
        (findings.judge_clock("clock", "the service", 3600.0), WRONG, "3600 s behind that of the service"),
        (findings.judge_packages(["a", "b"], {"a": "1", "b": "2"}, {"a": "1", "c": "5"}), OK, "All 2 needed packages"),
        (findings.judge_packages(["a", "b"], {"a": "1"}, {}), WRONG, "not installed: b."),
        (findings.judge_packages(["a"], {"a": "2"}, {"a": "1"}), WARNING, "a 2 (tested: 1)"),
        (findings.judge_packages(list("abcdefgh"), {}, {}), WRONG, "a, b, c, d, e and 3 more"),
        (findings.judge_kernel(has_kernel=True, compiler=None), OK, "is compiled"),
        (findings.judge_kernel(has_kernel=False, compiler=None), WARNING, "There is no C++ compiler."),
        (findings.judge_kernel(has_kernel=False, compiler="/usr/bin/c++"), WARNING, "half the speed."),
        (findings.judge_redis("8.1.0", "noeviction", is_persistent=True), OK, "release 8.1.0"),
        (findings.judge_redis("8.1.0", "noeviction", is_persistent=False), WARNING, "does not write to a disk"),
        (findings.judge_redis("8.1.0", "allkeys-lru", is_persistent=True), WRONG, "maxmemory-policy allkeys-lru"),
        (findings.judge_redis("6.2.1", "noeviction", is_persistent=True), WRONG, "without functions"),
        (findings.judge_redis("?", "noeviction", is_persistent=True), WRONG, "release ?"),
    ],
)
def test_what_a_fact_means(finding: Finding, level: Level, says: str) -> None:
    assert finding.level is level
    assert says in finding.says
    assert bool(finding.do) is (level is not OK), "each fault has a remedy"


@pytest.mark.parametrize(
    ("version", "for_cpus", "accelerators", "may_be_unknown", "level", "says"),
    [
        ("0.32.0", True, 0, False, OK, "built for CPUs"),
        ("0.32.0+cpu", True, 0, False, OK, "vLLM 0.32.0+cpu"),
        ("0.33.0", True, 0, False, WRONG, "only in vLLM 0.32.0"),
        ("0.33.0", True, 0, True, OK, "vLLM 0.33.0"),
        ("0.33.0", False, 2, False, OK, "built for GPUs"),
        ("0.32.0", False, 0, False, WRONG, "This machine has no GPU."),
        ("0.32.0", True, 2, False, WARNING, "The GPUs of this machine are not used."),
        (None, False, 0, False, WRONG, "vLLM is not installed"),
    ],
)
def test_engines(version: str | None, for_cpus: bool, accelerators: int, may_be_unknown: bool, level: Level, says: str) -> None:
    finding = findings.judge_engine(version, for_cpus=for_cpus, accelerators=accelerators, known=["0.32.0"], may_be_unknown=may_be_unknown)
    assert finding.level is level
    assert says in finding.says


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", cache=tmp_path / "cache", tenants=tmp_path / "tenants")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which another process listens."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_the_port_of_another_process(settings: Settings, taken: int) -> None:
    finding = machine.check_port(replace(settings, port=taken), is_running=False)
    assert (finding.level, "Address already in use" in finding.says) == (WRONG, True)
    assert machine.check_port(replace(settings, port=taken), is_running=True).level is OK


def test_the_port_of_a_stack_elsewhere(settings: Settings, taken: int) -> None:
    free = replace(settings, port=taken, host="127.0.0.2")
    assert machine.check_port(free, is_running=False).level is OK
    assert machine.check_port(free, is_running=True).level is WARNING
    assert machine.check_port(replace(settings, port=70_000), is_running=False).level is WRONG


def test_a_home_that_is_no_folder(settings: Settings) -> None:
    assert [finding.level for finding in machine.check_home(settings) if finding.level is WRONG] == []
    settings.home.write_text("a file")
    wrong = {finding.check: finding.do for finding in machine.check_home(settings) if finding.level is WRONG}
    assert wrong == {"home": "Set LMAAS_HOME to a folder."}


def test_a_running_stack_is_seen_by_its_lock(settings: Settings) -> None:
    assert not machine.is_running(settings.home)
    settings.home.mkdir()
    with (settings.home / "lock").open("w") as file:
        assert not machine.is_running(settings.home)
        fcntl.flock(file, fcntl.LOCK_EX)
        assert machine.is_running(settings.home)


def test_manifests(settings: Settings) -> None:
    assert machine.check_manifests(settings).level is OK
    settings.tenants.mkdir()
    (settings.tenants / "a.yaml").write_text("name: a\n")
    assert machine.check_manifests(settings).says == f"1 tenants and 0 base models in {settings.tenants}."
    (settings.tenants / "b.yaml").write_text("nome: b\n")
    finding = machine.check_manifests(settings)
    assert (finding.level, "'nome' is not known" in finding.says) == (WRONG, True)


@pytest.mark.parametrize(
    ("content", "mode", "level"),
    [
        (json.dumps({"base_url": "http://x/v1", "operator_key": "k"}), 0o600, OK),
        (json.dumps({"base_url": "http://x/v1", "operator_key": "k"}), 0o644, WARNING),
        ("{}", 0o600, WRONG),
        ("[", 0o600, WRONG),
        (None, 0, OK),
    ],
)
def test_credentials(settings: Settings, content: str | None, mode: int, level: Level) -> None:
    settings.home.mkdir()
    if content is not None:
        settings.credentials_path.write_text(content)
        os.chmod(settings.credentials_path, mode)
    assert [finding.level for finding in service.check_credentials(settings, is_running=False)] == [level]


def test_half_of_the_credentials(settings: Settings) -> None:
    assert [each.level for each in service.check_credentials(replace(settings, url="http://x"), is_running=False)] == [WRONG]


def test_servers_that_are_away_are_said_without_passwords(settings: Settings) -> None:
    away = replace(
        settings, database_url="postgresql+psycopg://me:hidden@127.0.0.1:1/x", redis_url="redis://:hidden@127.0.0.1:1", object_store_url=""
    )
    [database] = service.check_database(away)
    queue = service.check_queue(away)
    assert queue is not None
    for finding in (database, queue):
        assert finding.level is WRONG
        assert "refused" in finding.says
        assert "hidden" not in finding.says
    assert service.check_queue(replace(settings, redis_url="nonsense")) == findings.wrong(
        "queue", "LMAAS_REDIS_URL is not the URL of a server.", "Write it like redis://host:6379."
    )
    assert service.check_queue(settings) is None
    assert list(service.check_database(settings)) == []


def test_the_object_store(settings: Settings, tmp_path: Path) -> None:
    assert service.check_objects(settings) is None
    there = service.check_objects(replace(settings, object_store_url=f"file://{tmp_path}/objects"))
    assert there is not None
    assert there.level is OK
    bad = service.check_objects(replace(settings, object_store_url="nonsense"))
    assert bad is not None
    assert bad.level is WRONG


def test_the_newest_migration(tmp_path: Path) -> None:
    assert service.newest_revision(tmp_path) is None
    for name in ("0001_begin.py", "0012_more.py", "notes.py"):
        (tmp_path / name).touch()
    assert service.newest_revision(tmp_path) == "0012"
    assert service.newest_revision() is not None


def run(*options: str, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    done = CliRunner().invoke(cli, ["doctor", "--json", *options], env=environment)
    return done.exit_code, json.loads(done.output)


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, b'{"error": {"message": "Incorrect API key provided.", "code": "invalid_api_key"}}', "Incorrect API key provided."),
        (503, b'{"error": {"message": "The database is away.", "code": "database_unavailable"}}', "The database is away."),
        (200, b"<html>", "answered with something that is not lmaas"),
    ],
)
def test_a_service_that_is_not_well(status: int, body: bytes, says: str) -> None:
    with serving(status, body) as url:
        code, found = run(LMAAS_URL=f"{url}/v1", LMAAS_API_KEY="sk-lmaas-x")
    assert code == 1
    [wrong] = [each for each in found if each["level"] == "wrong"]
    assert (wrong["check"], says in wrong["says"]) == ("service", True)
    # A client's own machine runs no part of the service.
    assert {each["check"] for each in found} == {"settings", "python", "packages", "credentials", "service"}


def test_a_wrong_setting_is_a_finding() -> None:
    code, found = run(LMAAS_PORT="x")
    assert code == 1
    assert found[0] == {
        "level": "wrong",
        "check": "settings",
        "says": "LMAAS_PORT must be a number (int), not 'x'.",
        "do": "Correct or unset the variable. What follows is checked with the default settings.",
    }
    assert "memory" in {each["check"] for each in found}


def test_a_machine_without_a_stack(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["doctor"], env={"LMAAS_HOME": str(tmp_path / "home"), "LMAAS_PORT": "0"})
    assert "LMAAS_PORT must be a number greater than 0" in done.output
    code, found = run(LMAAS_HOME=str(tmp_path / "home"), LMAAS_ENGINE_MODULE="lmaas.testing.fake_engine")
    by_check = {each["check"]: each for each in found}
    assert by_check["service"]["says"] == f"No stack runs in {tmp_path / 'home'}. `lmaas up` starts one."
    assert code == any(each["level"] == "wrong" for each in found)
    assert not (tmp_path / "home").exists(), "nothing is changed"


def test_the_summary_names_what_is_wrong() -> None:
    with serving(503, b"{}") as url:
        done = CliRunner().invoke(cli, ["doctor"], env={"LMAAS_URL": f"{url}/v1", "LMAAS_API_KEY": "sk-lmaas-x"})
    assert done.exit_code == 1
    assert "wrong    service" in done.output
    assert "→ Look at its logs" in done.output
    assert "1 thing is wrong" in done.output.splitlines()[-1]


def test_without_credentials_there_is_no_service_to_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LMAAS_HOME", str(tmp_path))
    assert list(service.check_service(Context(), is_running=True)) == []
