"""Replicas as processes of this machine: their accelerators, and the knowledge of a controller that has just started."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmaas.config import Settings
from lmaas.control.provisioners import local
from lmaas.control.provisioners.local import LocalProvisioner, visible_devices
from lmaas.types import Resources
from tests.support.conditions import until


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace supervisors by a script that only prints its environment, and sleeps: these tests have no database."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "keys=$LMAAS_OPERATOR_KEY$LMAAS_API_KEY."\necho "sees=$CUDA_VISIBLE_DEVICES"\nexec sleep 600\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.delenv(local.VISIBLE, raising=False)


class Machine:
    """A machine whose settings name two accelerators and three CPUs. Each of its provisioners starts without knowledge of the others."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home, local_accelerators=2, local_cpus=3, zygote="off")
        self.provisioners: list[LocalProvisioner] = []

    def provisioner(self) -> LocalProvisioner:
        self.provisioners.append(LocalProvisioner(self.settings))
        return self.provisioners[-1]

    def facts(self, replica_id: str) -> Path:
        return self.settings.home / "replicas" / replica_id / "process.json"


@pytest.fixture
async def machine(tmp_path: Path, stand_in: None) -> AsyncIterator[Machine]:
    """The machine; no process is left on it afterwards."""
    found, before = Machine(tmp_path), set(psutil.Process().children())
    yield found
    started = [child for child in psutil.Process().children() if child not in before]
    for child in started:
        child.kill()
    psutil.wait_procs(started)
    for provisioner in found.provisioners:
        await provisioner.list()  # it forgets its own children that have ended


async def sees(settings: Settings, replica_id: str) -> str:
    path = settings.home / "replicas" / replica_id / "supervisor.log"
    await until(lambda: "sees=" in path.read_text())
    return path.read_text().split("sees=")[1].splitlines()[0]


async def test_each_replica_gets_accelerators_of_its_own(machine: Machine) -> None:
    provisioner = machine.provisioner()
    assert await provisioner.capacity() == Resources(3, 2)
    await provisioner.start("rep_a", "mod_a", Resources(1, 1))
    # A controller that has just started knows which accelerators are taken.
    provisioner = machine.provisioner()
    await provisioner.start("rep_b", "mod_b", Resources(1, 1))
    await provisioner.start("rep_c", "mod_c", Resources(1, 0))
    assert [await sees(machine.settings, name) for name in ("rep_a", "rep_b", "rep_c")] == ["0", "1", ""]
    with pytest.raises(OSError, match="needs 1 accelerators, and 0 of 2 are free"):
        await provisioner.start("rep_d", "mod_d", Resources(1, 1))
    assert await provisioner.list() == {"rep_a": "mod_a", "rep_b": "mod_b", "rep_c": "mod_c"}
    await provisioner.kill("rep_a")

    async def gone() -> bool:
        return "rep_a" not in await provisioner.list()

    await until(gone)
    await provisioner.start("rep_d", "mod_d", Resources(1, 1))
    assert await sees(machine.settings, "rep_d") == "0"


async def test_a_controller_that_dies_while_it_starts_one_gives_no_accelerator_twice(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = machine.provisioner()
    real, started = subprocess.Popen, []

    def killed_after_the_start(*arguments: Any, **options: Any) -> None:
        started.append(real(*arguments, **options))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", killed_after_the_start)
        with pytest.raises(KeyboardInterrupt):
            await dying.start("rep_a", "mod_a", Resources(1, 1))
    assert await sees(machine.settings, "rep_a") == "0", "it runs, but its pid was never recorded"
    provisioner = machine.provisioner()
    assert await provisioner.list() == {}
    await provisioner.start("rep_b", "mod_b", Resources(1, 1))
    assert await sees(machine.settings, "rep_b") == "1"
    # This ends when the replica is written off.
    monkeypatch.setattr(local, "MAY_BEGIN_S", 0.0)
    await provisioner.start("rep_c", "mod_c", Resources(1, 1))
    assert await sees(machine.settings, "rep_c") == "0"
    (process,) = started
    process.kill()
    process.wait()


async def test_one_that_cannot_be_started_takes_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    provisioner = machine.provisioner()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "/no/such/python")
        with pytest.raises(FileNotFoundError):
            await provisioner.start("rep_a", "mod_a", Resources(1, 2))
    await provisioner.start("rep_b", "mod_b", Resources(1, 2))


async def test_what_an_older_release_wrote_is_understood(machine: Machine) -> None:
    provisioner = machine.provisioner()
    await provisioner.start("rep_a", "mod_a", Resources(1, 0))
    path = machine.facts("rep_a")
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({name: facts[name] for name in ("pid", "started", "boot", "pool")}))
    assert await machine.provisioner().list() == {"rep_a": "mod_a"}
    path.write_text(json.dumps(facts | {"cpus": 1.0}))
    assert await machine.provisioner().list() == {"rep_a": "mod_a"}


async def test_a_pid_of_somebody_else_is_not_a_replica(machine: Machine) -> None:
    provisioner = machine.provisioner()
    await provisioner.start("rep_a", "mod_a", Resources(1, 1))
    path = machine.facts("rep_a")
    facts = json.loads(path.read_text())
    for changes in ({"started": facts["started"] - 100}, {"boot": "another"}, {"pid": 2**22 + 1}):
        path.write_text(json.dumps(facts | changes))
        assert await machine.provisioner().list() == {}
    path.write_text("{")
    assert await machine.provisioner().list() == {}


@pytest.mark.parametrize(
    ("offered", "visible", "present", "expected"),
    [
        (None, None, 0, []),
        (0, None, 4, []),
        (None, None, 2, ["0", "1"]),
        (1, None, 2, ["0"]),
        (8, None, 2, ["0", "1"]),
        (2, None, 0, ["0", "1"]),  # not from NVIDIA, so the operator's number counts
        (None, "", 2, []),
        (None, "-1", 2, []),
        (None, "3, GPU-1f", 8, ["3", "GPU-1f"]),
        (1, "3,5", 8, ["3"]),
    ],
)
def test_which_accelerators_there_are(tmp_path: Path, offered: int | None, visible: str | None, present: int, expected: list[str]) -> None:
    folder = tmp_path / "gpus"
    for number in range(present):
        (folder / f"0000:{number}").mkdir(parents=True)
    assert visible_devices(offered, visible, folder) == expected


async def test_without_settings_all_of_the_machine_is_offered(machine: Machine) -> None:
    settings = replace(machine.settings, local_cpus=None, local_accelerators=None)
    capacity = await LocalProvisioner(settings).capacity()
    assert capacity.cpus == len(os.sched_getaffinity(0))


async def test_supervisors_get_no_keys(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMAAS_OPERATOR_KEY", "secret")
    machine.settings = replace(machine.settings, operator_key="secret", api_key="secret")
    await machine.provisioner().start("rep_a", "mod_a", Resources(1, 0))
    await sees(machine.settings, "rep_a")
    assert "keys=.\n" in (machine.settings.home / "replicas" / "rep_a" / "supervisor.log").read_text()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("", ""),
        ('{"level": "INFO", "message": "engine ready"}\n', ""),
        ('{"level": "INFO"}\nTraceback (most recent call last):\n  File …\nOSError: no space left\n\n', "OSError: no space left"),
        ("x" * 10_000 + "\nlmaas: Set LMAAS_DATABASE_URL.", "lmaas: Set LMAAS_DATABASE_URL."),
    ],
)
async def test_why_one_is_gone(tmp_path: Path, said: str, told: str) -> None:
    provisioner = LocalProvisioner(Settings(home=tmp_path, zygote="off"))
    assert await provisioner.last_words("rep_1") == ""
    log = tmp_path / "replicas" / "rep_1" / "supervisor.log"
    log.parent.mkdir(parents=True)
    log.write_text(said)
    assert await provisioner.last_words("rep_1") == told
