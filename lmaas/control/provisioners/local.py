"""Replicas as processes on this machine."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from lmaas.config import Settings
from lmaas.engine.launch import VLLM, forked_supervisor, zygote_owner
from lmaas.engine.zygote.client import NoZygote, go

#: A process's start, in seconds since the boot, is known with this much error.
SAME_START_S = 0.5
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class LocalProvisioner:
    """Each supervisor leads a session of its own, so that a signal to our terminal does not reach it.

    `$LMAAS_HOME/replicas/<id>/process.json` remembers it across restarts of the controller: the pid with the process's start time,
    since pids are used again.
    """

    def __init__(self, settings: Settings) -> None:
        self._home, self._folder = settings.home, settings.home / "replicas"
        self._environment = os.environ | settings.environment()
        with_zygote = settings.zygote == "on" and settings.engine_module == VLLM
        self._zygote = zygote_owner(settings.home, settings.orphan_timeout_s) if with_zygote else None
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    async def start(self, replica_id: str, pool_id: str) -> None:
        """Start the supervisor of a replica. Raises OSError if it cannot be started."""
        folder = self._folder / replica_id
        folder.mkdir(parents=True, exist_ok=True)
        log_path, arguments = folder / "supervisor.log", ["supervise", replica_id]
        if self._zygote is not None:
            forked = await forked_supervisor(self._home, arguments, self._environment, log_path)
            if forked is not None:
                with suppress(psutil.NoSuchProcess, NoZygote):
                    self._note(replica_id, forked.pid, pool_id)
                    go(forked)
                    return
        with log_path.open("ab") as log:
            child = subprocess.Popen(  # noqa: ASYNC220 (returns at once)
                [sys.executable, "-m", "lmaas", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self._environment,
            )
        self._children[replica_id] = child
        self._note(replica_id, child.pid, pool_id)

    def _note(self, replica_id: str, pid: int, pool_id: str) -> None:
        folder = self._folder / replica_id
        partial = folder / "process.json.partial"
        partial.write_text(json.dumps(asdict(_Facts(pid, _started(pid), _boot(), pool_id))))
        partial.rename(folder / "process.json")

    async def kill(self, replica_id: str) -> None:
        """End a replica's processes now, without drain. Killing one that is gone is no error."""
        facts = self._facts(replica_id)
        if facts is not None and _alive(facts):
            # The engine is in the supervisor's process group.
            with suppress(ProcessLookupError):
                os.killpg(facts.pid, signal.SIGKILL)

    async def list(self) -> dict[str, str]:
        """The replicas whose supervisor runs: replica id → pool id. Forgets the folders of those that ended long ago. Called at each look
        of the controller, which is also when the zygote is looked after."""
        if self._zygote is not None:
            await self._zygote.ensure()
        return await asyncio.to_thread(self._list)

    def _list(self) -> dict[str, str]:
        for replica_id, child in list(self._children.items()):
            if child.poll() is not None:
                del self._children[replica_id]
        found = {}
        ended = []
        for path in self._folder.glob("*/process.json"):
            replica_id = path.parent.name
            facts = self._facts(replica_id)
            if facts is not None and _alive(facts):
                found[replica_id] = facts.pool
            else:
                ended.append(path.parent)
        # The logs of the last replicas that ended stay, for whoever asks why.
        for folder in sorted(ended, key=lambda path: path.stat().st_mtime)[:-20]:
            shutil.rmtree(folder, ignore_errors=True)
        return found

    def _facts(self, replica_id: str) -> "_Facts | None":
        try:
            return _Facts(**json.loads((self._folder / replica_id / "process.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None


@dataclass(frozen=True, slots=True)
class _Facts:
    pid: int
    #: Since the boot: the wall clock may be set.
    started: float
    boot: str
    pool: str


def _started(pid: int) -> float:
    return psutil.Process(pid).create_time() - psutil.boot_time()


def _boot() -> str:
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""


def _alive(facts: _Facts) -> bool:
    try:
        same = facts.boot == _boot() and abs(_started(facts.pid) - facts.started) < SAME_START_S
        return same and psutil.Process(facts.pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
