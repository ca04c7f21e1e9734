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

#: A process's start, in seconds since the boot, is known with this much error.
SAME_START_S = 0.5
#: In the note of one that is about to be started; `started` is then the time of the note.
NO_PID = 0
#: How long its accelerators are kept for one whose pid was never noted.
MAY_BEGIN_S = 120.0
#: The variable by which an engine sees its accelerators.
VISIBLE = "CUDA_VISIBLE_DEVICES"
DEVICES = Path("/proc/driver/nvidia/gpus")
#: What supervisors have no use for.
FOR_OTHERS = frozenset({"LMAAS_OPERATOR_KEY", "LMAAS_API_KEY", "LMAAS_DATABASE_PASSWORDS", "LMAAS_REPLICA_DATABASE_URL"})
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class LocalProvisioner:
    """Each supervisor leads a session of its own, so that a signal to our terminal does not reach it.

    `$LMAAS_HOME/replicas/<id>/process.json` remembers it across restarts of the controller: the pid with the process's start time,
    since pids are used again, and the accelerators that it was given. What no replica that runs was given is free.
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
        # Starts come one after the other (the controller's), so no other takes the same accelerators meanwhile.
        devices = self._take(needs.accelerators)
        # Without any of its own it must not touch another's; where the machine has none, nothing is hidden.
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
        # Before there is a process: if we are killed between the two, its accelerators must not be given to another.
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
        """So many accelerators that no running replica has. Raises OSError if there are fewer."""
        if count == 0:
            return []
        noted = filter(None, (self._facts(path.parent.name) for path in self._folder.glob("*/process.json")))
        taken = {device for facts in noted if _alive(facts) or _may_begin(facts) for device in facts.accelerators}
        free = [device for device in self._devices if device not in taken]
        if len(free) < count:
            raise OSError(f"it needs {count} accelerators, and {len(free)} of {len(self._devices)} are free")
        return free[:count]

    def start_delay_s(self) -> float:
        """Return by how many seconds a start takes longer at present than starts usually do."""
        # Starts wait for a zygote that still imports.
        return 0.0 if self._zygote is None else start_delay_s(self._zygote.seen)

    def first_start_s(self) -> float:
        """Return how many seconds a start takes, without that delay, if none of its base model is known."""
        return FIRST_START_S["plain"] if self._zygote is None else first_start_s(self._zygote.seen)

    async def capacity(self) -> Resources:
        """What this machine offers to replicas: by setting, or all of it."""
        return self._capacity

    async def kill(self, replica_id: str) -> None:
        """End a replica's processes now, without drain. Killing one that is gone is no error."""
        facts = self._facts(replica_id)
        if facts is not None and _alive(facts):
            # An engine that was started plainly is in the supervisor's process group; one that the zygote forked is killed by its keeper,
            # which sees the supervisor's connection close.
            with suppress(ProcessLookupError):
                os.killpg(facts.pid, signal.SIGKILL)

    async def list(self) -> dict[str, str]:
        """The replicas whose supervisor runs: replica id → pool id. Forgets the folders of those that ended long ago. Called at each look
        of the controller, which is also when the zygote is looked after."""
        if self._zygote is not None:
            self._zygote.tend()  # no start waits for that
        return await asyncio.to_thread(self._list)

    async def last_words(self, replica_id: str) -> str:
        """Why its supervisor has ended, if it said so; else empty."""
        return last_words(self._folder / replica_id / "supervisor.log")

    def _list(self) -> dict[str, str]:
        for replica_id, child in list(self._children.items()):
            if child.poll() is not None:
                del self._children[replica_id]
        running = self._running()
        ended = [path.parent for path in self._folder.glob("*/process.json") if path.parent.name not in running]
        # The logs of the last replicas that ended stay: they say why.
        for folder in sorted(ended, key=lambda path: path.stat().st_mtime)[:-20]:
            shutil.rmtree(folder, ignore_errors=True)
        return {replica_id: facts.pool for replica_id, facts in running.items()}

    def _running(self) -> "dict[str, _Facts]":
        found = {path.parent.name: self._facts(path.parent.name) for path in self._folder.glob("*/process.json")}
        return {replica_id: facts for replica_id, facts in found.items() if facts is not None and _alive(facts)}

    def _facts(self, replica_id: str) -> "_Facts | None":
        try:
            found = json.loads((self._folder / replica_id / "process.json").read_text())
            # Another release may have noted more.
            return _Facts(**{name: found[name] for name in _Facts.__slots__ if name in found})
        except (OSError, ValueError, TypeError):
            return None


def zygote_of(settings: Settings) -> ZygoteOwner | None:
    """The owner of this home folder's zygote, which starts none until its `ensure` is called; None if engines here are started without."""
    if settings.zygote == "on" and settings.provisioner == "local" and settings.engine_module == VLLM:
        return zygote_owner(settings.home, settings.orphan_timeout_s)
    return None


@dataclass(frozen=True, slots=True)
class _Facts:
    pid: int
    #: Since the boot: the wall clock may be set.
    started: float
    boot: str
    pool: str
    accelerators: list[str] = field(default_factory=list)


def _started(pid: int) -> float:
    return psutil.Process(pid).create_time() - psutil.boot_time()


def _boot() -> str:
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""


def _may_begin(facts: _Facts) -> bool:
    """Whether a controller was about to start it, and may have: if its pid was never noted, it is written off, and ends with its drain."""
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
    """The accelerators that replicas may be given, as CUDA names them: those that we see ourselves, at most as many as are `offered`."""
    if visible is not None:
        found = [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1")]
    elif folder.is_dir():
        found = [str(index) for index in range(len(list(folder.iterdir())))]
    else:
        found = [str(index) for index in range(offered or 0)]
    return found if offered is None else found[:offered]
