"""Replicas as processes on this machine."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from lmaas.config import Settings
from lmaas.engine.launch import VLLM, forked_supervisor, zygote_owner
from lmaas.engine.zygote.client import NoZygote, go
from lmaas.engine.zygote.owner import ZygoteOwner
from lmaas.engine.zygote.policy import FIRST_START_S, first_start_s, start_delay_s
from lmaas.process import last_words
from lmaas.types import Resources

#: The error of a process's start time, in seconds since the boot.
SAME_START_S = 0.5
#: The pid in the note of a replica that is about to be started. `started` is then the time of the note.
NO_PID = 0
#: The time for which accelerators stay reserved for a replica whose pid was never noted.
MAY_BEGIN_S = 120.0
#: The variable that selects the accelerators of an engine.
VISIBLE = "CUDA_VISIBLE_DEVICES"
DEVICES = Path("/proc/driver/nvidia/gpus")
#: Variables that supervisors do not need.
FOR_OTHERS = frozenset({"LMAAS_OPERATOR_KEY", "LMAAS_API_KEY", "LMAAS_DATABASE_PASSWORDS", "LMAAS_REPLICA_DATABASE_URL"})
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class LocalProvisioner:
    """Starts each supervisor in its own session, so that a signal to the terminal does not reach it.

    `$LMAAS_HOME/replicas/<id>/process.json` keeps each replica across restarts of the controller: its pid with the process's start time,
    since pids are reused, and its accelerators. Accelerators that belong to no running replica are free.
    """

    def __init__(self, settings: Settings) -> None:
        self._home, self._folder = settings.home, settings.home / "replicas"
        self._environment = {name: value for name, value in (os.environ | settings.environment()).items() if name not in FOR_OTHERS}
        self._devices = visible_devices(settings.local_accelerators, os.environ.get(VISIBLE), DEVICES)
        self._capacity = Resources(settings.local_cpus or float(len(os.sched_getaffinity(0))), len(self._devices))
        self._zygote = zygote_of(settings)
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    async def start(self, replica_id: str, pool_id: str, needs: Resources) -> None:
        """Start the supervisor of a replica, with accelerators of its own. Raises OSError if it cannot be started."""
        # The controller starts one replica at a time, so no other start takes the same accelerators meanwhile.
        devices = self._take(needs.accelerators)
        # A replica without accelerators must not use those of another. On a machine without accelerators, the variable is not set.
        variables = self._environment | ({VISIBLE: ",".join(devices)} if self._devices else {})
        folder = self._folder / replica_id
        folder.mkdir(parents=True, exist_ok=True)
        log_path, arguments = folder / "supervisor.log", ["supervise", replica_id]
        if self._zygote is not None:
            forked = await forked_supervisor(self._home, arguments, variables, log_path)
            if forked is not None:
                with suppress(psutil.NoSuchProcess, NoZygote):
                    self._note(replica_id, _Facts(forked.pid, _started(forked.pid), _boot(), pool_id, devices))
                    go(forked)
                    return
        # Written before the process exists. If this process is killed in between, the accelerators must not be given to another replica.
        self._note(replica_id, _Facts(NO_PID, time.monotonic(), _boot(), pool_id, devices))
        try:
            with log_path.open("ab") as log:
                child = subprocess.Popen(  # noqa: ASYNC220 (returns at once)
                    [sys.executable, "-m", "lmaas", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env=variables,
                )
        except OSError:
            (folder / "process.json").unlink()
            raise
        self._children[replica_id] = child
        self._note(replica_id, _Facts(child.pid, _started(child.pid), _boot(), pool_id, devices))

    def _note(self, replica_id: str, facts: "_Facts") -> None:
        folder = self._folder / replica_id
        partial = folder / "process.json.partial"
        partial.write_text(json.dumps(asdict(facts)))
        partial.rename(folder / "process.json")

    def _take(self, count: int) -> list[str]:
        """Return `count` accelerators that no running replica has. Raises OSError if there are fewer."""
        if count == 0:
            return []
        noted = filter(None, (self._facts(path.parent.name) for path in self._folder.glob("*/process.json")))
        taken = {device for facts in noted if _alive(facts) or _may_begin(facts) for device in facts.accelerators}
        free = [device for device in self._devices if device not in taken]
        if len(free) < count:
            raise OSError(f"it needs {count} accelerators, and {len(free)} of {len(self._devices)} are free")
        return free[:count]

    def start_delay_s(self) -> float:
        """Return the seconds that a start takes longer at present than usual."""
        # Starts wait for a zygote that is still importing.
        return 0.0 if self._zygote is None else start_delay_s(self._zygote.seen)

    def first_start_s(self) -> float:
        """Return the duration of a start in seconds, without that delay, for a base model without earlier starts."""
        return FIRST_START_S["plain"] if self._zygote is None else first_start_s(self._zygote.seen)

    async def capacity(self) -> Resources:
        """Return the capacity that is set, or else that of the whole machine."""
        return self._capacity

    async def kill(self, replica_id: str) -> None:
        """End a replica's processes now, without a drain. Killing a replica that has ended is no error."""
        facts = self._facts(replica_id)
        if facts is not None and _alive(facts):
            # A plainly started engine is in the supervisor's process group. A forked engine is killed by its keeper when the supervisor's
            # connection closes.
            with suppress(ProcessLookupError):
                os.killpg(facts.pid, signal.SIGKILL)

    async def list(self) -> dict[str, str]:
        """Return the replicas whose supervisor runs: replica id → pool id. Also deletes the folders of replicas that ended long ago, and
        checks the zygote, because the controller calls this regularly."""
        if self._zygote is not None:
            self._zygote.tend()  # runs in a task, so that this call does not wait for the zygote
        return await asyncio.to_thread(self._list)

    async def last_words(self, replica_id: str) -> str:
        """Return the reason why the supervisor ended, if its log contains one, or an empty string."""
        return last_words(self._folder / replica_id / "supervisor.log")

    def _list(self) -> dict[str, str]:
        for replica_id, child in list(self._children.items()):
            if child.poll() is not None:
                del self._children[replica_id]
        running = self._running()
        ended = [path.parent for path in self._folder.glob("*/process.json") if path.parent.name not in running]
        # Keep the folders of the last replicas that ended, because their logs contain the reason.
        for folder in sorted(ended, key=lambda path: path.stat().st_mtime)[:-20]:
            shutil.rmtree(folder, ignore_errors=True)
        return {replica_id: facts.pool for replica_id, facts in running.items()}

    def _running(self) -> "dict[str, _Facts]":
        found = {path.parent.name: self._facts(path.parent.name) for path in self._folder.glob("*/process.json")}
        return {replica_id: facts for replica_id, facts in found.items() if facts is not None and _alive(facts)}

    def _facts(self, replica_id: str) -> "_Facts | None":
        try:
            found = json.loads((self._folder / replica_id / "process.json").read_text())
            # Another release may have written further fields.
            return _Facts(**{name: found[name] for name in _Facts.__slots__ if name in found})
        except (OSError, ValueError, TypeError):
            return None


def zygote_of(settings: Settings) -> ZygoteOwner | None:
    """Return the owner of this home folder's zygote, or None if engines are started without one. No zygote starts before its `ensure` is
    called."""
    if settings.zygote == "on" and settings.provisioner == "local" and settings.engine_module == VLLM:
        return zygote_owner(settings.home, settings.orphan_timeout_s)
    return None


@dataclass(frozen=True, slots=True)
class _Facts:
    pid: int
    #: Seconds since the boot, because the wall clock may be changed.
    started: float
    boot: str
    pool: str
    accelerators: list[str] = field(default_factory=list)


def _started(pid: int) -> float:
    return psutil.Process(pid).create_time() - psutil.boot_time()


def _boot() -> str:
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""


def _may_begin(facts: _Facts) -> bool:
    """Return whether the replica may be starting: a controller was about to start it, and its pid is not noted. If the pid is never noted,
    the controller gives the replica up, and its supervisor drains and ends if it runs."""
    return facts.pid == NO_PID and facts.boot == _boot() and time.monotonic() - facts.started < MAY_BEGIN_S


def _alive(facts: _Facts) -> bool:
    if facts.pid == NO_PID:
        return False
    try:
        same = facts.boot == _boot() and abs(_started(facts.pid) - facts.started) < SAME_START_S
        return same and psutil.Process(facts.pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def visible_devices(offered: int | None, visible: str | None, folder: Path) -> list[str]:
    """Return the accelerators for replicas, by CUDA's names: those that this process may use, at most `offered`."""
    if visible is not None:
        found = [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1")]
    elif folder.is_dir():
        found = [str(index) for index in range(len(list(folder.iterdir())))]
    else:
        found = [str(index) for index in range(offered or 0)]
    return found if offered is None else found[:offered]
