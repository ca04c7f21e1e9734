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

import psutil

from lmaas.config import Settings

#: A process's start time is given in seconds with this much error.
SAME_START_S = 1.0


class LocalProvisioner:
    """Each supervisor leads a session of its own, so that a signal to our terminal does not reach it.

    `$LMAAS_HOME/replicas/<id>/process.json` remembers it across restarts of the controller: the pid with the process's start time,
    since pids are used again.
    """

    def __init__(self, settings: Settings) -> None:
        self._folder = settings.home / "replicas"
        self._environment = os.environ | settings.environment()
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    async def start(self, replica_id: str, pool_id: str) -> None:
        """Start the supervisor of a replica. Raises OSError if it cannot be started."""
        folder = self._folder / replica_id
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "supervisor.log").open("ab") as log:
            child = subprocess.Popen(  # noqa: ASYNC220 (returns at once)
                [sys.executable, "-m", "lmaas", "supervise", replica_id],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self._environment,
            )
        self._children[replica_id] = child
        facts = _Facts(child.pid, psutil.Process(child.pid).create_time(), pool_id)
        partial = folder / "process.json.partial"
        partial.write_text(json.dumps(asdict(facts)))
        partial.rename(folder / "process.json")

    async def kill(self, replica_id: str) -> None:
        """End a replica's processes now, without drain. Killing one that is gone is no error."""
        facts = self._facts(replica_id)
        if facts is not None and _alive(facts):
            # The engine is in the supervisor's process group.
            with suppress(ProcessLookupError):
                os.killpg(facts.pid, signal.SIGKILL)

    async def list(self) -> dict[str, str]:
        """The replicas whose supervisor runs: replica id → pool id. Forgets the folders of those that ended long ago."""
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
    started: float
    pool: str


def _alive(facts: _Facts) -> bool:
    try:
        process = psutil.Process(facts.pid)
        same = abs(process.create_time() - facts.started) < SAME_START_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
