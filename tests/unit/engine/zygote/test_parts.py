"""The parts of the zygote that need no vLLM."""

import itertools
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from lmaas.engine.zygote import wire
from lmaas.engine.zygote.commands import REMEMBERED, command_key, read_commands, remember
from lmaas.engine.zygote.owner import EVERY_S, RESTART_MAX_S, ZygoteOwner
from lmaas.engine.zygote.preload import AVOIDED, Preloaded
from tests.support.clocks import Clock


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--model", "m", "--host", "127.0.0.1", "--port", "1", "--dtype", "float32"], ["--model", "m", "--dtype", "float32"]),
        (["--port", "1"], []),
        (["--model", "--port-of-call"], ["--model", "--port-of-call"]),
    ],
)
def test_engines_of_a_pool_have_one_key(arguments: list[str], key: list[str]) -> None:
    assert command_key(arguments) == key


def test_the_last_commands_are_remembered(tmp_path: Path) -> None:
    path = tmp_path / "zygote" / "commands.json"
    assert read_commands(path) == []
    for number in range(REMEMBERED + 2):
        remember(path, [str(number)])
    remember(path, ["5"])
    assert [command for (command,) in read_commands(path)] == ["5", "9", "8", "7", "6", "4", "3", "2"]
    path.write_text("[[1, 2")
    assert read_commands(path) == []


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({}, ""),
        ({"VLLM_LOGGING_LEVEL": "DEBUG"}, "$VLLM_LOGGING_LEVEL"),
        ({"HOME": "/other"}, "$HOME"),
        ({"CUDA_VISIBLE_DEVICES": "3", "LMAAS_START_MARKS": "x", "RAY_JOB_ID": "7", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "4"}, ""),
    ],
)
def test_what_must_be_the_same_for_a_fork(change: dict[str, str], differs: str) -> None:
    environment = {"HOME": "/home/me", "HF_TOKEN": "very secret"}
    facts = wire.facts(environment)
    assert wire.difference(facts, wire.facts(environment | change)) == differs
    assert "very secret" not in str(facts)


async def test_a_zygote_that_does_not_last_is_started_later_and_later(tmp_path: Path) -> None:
    clock, starts = Clock(), []
    (tmp_path / "zygote").mkdir()

    def start() -> "subprocess.Popen[bytes]":
        starts.append(clock.now)
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        return process

    owner = ZygoteOwner(tmp_path, start, dict, clock)
    for _ in range(2000):
        await owner.ensure()
        await owner.ensure()  # too soon to check again
        clock.now += EVERY_S
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert gaps == sorted(gaps)
    assert gaps[0] <= 4 < gaps[3] < max(gaps) <= RESTART_MAX_S + EVERY_S


def preloaded() -> Preloaded:
    return object.__new__(Preloaded)


@pytest.mark.parametrize(("cuda", "threads", "reason"), [(False, 1, ""), (True, 1, "CUDA"), (False, 3, "3 threads")])
def test_a_process_with_cuda_or_threads_is_not_forked(monkeypatch: pytest.MonkeyPatch, cuda: bool, threads: int, reason: str) -> None:
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: cuda))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(os, "listdir", lambda _: [str(number) for number in range(threads)])
    found = preloaded().unfit()
    assert reason in found
    assert bool(found) == bool(reason)


class Spoilt(Preloaded):
    """A zygote in which preparing for `bad` leaves a thread behind."""

    def __init__(self, commands: Path) -> None:
        self.tried: list[str] = []
        self.threads = 1
        self._commands, self._avoided = commands, commands.with_name(AVOIDED)

    def unfit(self) -> str:
        """Return a reason if there is more than one thread."""
        return f"{self.threads} threads" if self.threads > 1 else ""

    def _prepare(self, command: list[str]) -> None:
        self.tried += command
        if command == ["bad"]:
            self.threads += 1


def test_a_command_that_spoils_a_zygote_spoils_no_second_one(tmp_path: Path) -> None:
    path = tmp_path / "commands.json"
    first = Spoilt(path)
    first.learn(["good", "--port", "1"])
    assert not first.unfit()
    first.learn(["bad", "--port", "1"])
    assert first.unfit()  # so it ends
    first.learn(["other"])
    assert first.tried == ["good", "bad"]
    assert read_commands(path) == [["good"]]
    remember(path, ["bad"])  # as `lmaas up` expects it
    second = Spoilt(path)
    for command in (["bad"], ["other"]):
        second.learn(command)
    assert second.tried == ["other"]
    assert not second.unfit()


def test_a_fork_whose_parent_is_gone_ends_although_a_hook_cannot_raise() -> None:
    script = (
        "import os; from lmaas.engine.zygote.server import _die_with\n"
        "os.register_at_fork(after_in_child=lambda: _die_with(1 << 30))\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "1"


def test_a_workers_threads_are_bound_as_libgomp_binds_them() -> None:
    mine = sorted(os.sched_getaffinity(0))
    script = (
        "import os, sys; from lmaas.engine.zygote.preload import bind_threads; import torch\n"
        f"bind_threads('2', '{mine[0]} {mine[-1]}')\n"
        "torch.ones(1 << 22).mul_(2.0)\n"
        "print(torch.get_num_threads(), [sorted(os.sched_getaffinity(int(t))) for t in sorted(os.listdir('/proc/self/task'), key=int)])\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True).stdout
    # One in the middle is torch's own.
    assert out.strip() == f"2 [[{mine[0]}], [{mine[0]}], [{mine[-1]}]]"
