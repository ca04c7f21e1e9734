"""The part of a replica that Ray runs on a node: an actor beside the supervisor, which is a process of its own."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ray

from lmaas.config import ENGINE_VARIABLES, PREFIX
from lmaas.process import bound_command, last_words

#: The number of ended replicas whose folders stay on a node, so that their logs can be read.
KEPT = 20


class NodeReplica:
    """Starts the supervisor of a replica on this node, and ends when it ends.

    The supervisor leads its own session, so it gets no signals meant for Ray. It dies with this process, and its engine with it, so no
    process is left when Ray kills the actor. Its home is `home` on this node's disk, with logs and the adapters that it has fetched.
    """

    def __init__(self, replica_id: str, environment: dict[str, str], home: str) -> None:
        root = Path(home).expanduser().absolute()
        root.mkdir(parents=True, mode=0o700, exist_ok=True)
        folder = root / "replicas" / replica_id
        with (root / "lock").open("wb") as one_at_a_time:
            fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
            folder.mkdir(parents=True)
            # This lock is held for as long as the process lives.
            self._lock = (folder / "lock").open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            forget_ended(root / "replicas")
        # The node's own variables are kept (credentials of the object store, Ray's accelerators). Settings are replaced by those of the
        # stack.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX) or name in ENGINE_VARIABLES}
        own = {"LMAAS_HOME": str(root), "LMAAS_ENGINE_HOST": ray.util.get_node_ip_address()}
        self._log = folder / "supervisor.log"
        with self._log.open("ab") as log:
            # Started by the main thread, which lives as long as the process, because a child is bound to the thread that started it.
            self._supervisor = subprocess.Popen(
                bound_command([sys.executable, "-m", "lmaas", "supervise", replica_id]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=inherited | environment | own,
            )
        self._leaving = False
        # The actor calls its own method, because the controller that created it may end before it has a node.
        ray.get_runtime_context().current_actor.watch.remote()

    def watch(self) -> str:
        """Wait for the supervisor's end, then end this actor. Returns why the supervisor ended."""
        code = self._supervisor.wait()
        if not self._leaving:
            # Queued behind the calls that wait here, so that they return first. Sent once only, because an actor with a pending call to
            # itself does not end.
            self._leaving = True
            ray.get_runtime_context().current_actor.leave.remote()
        return last_words(self._log) or f"it ended with code {code}"

    def leave(self) -> None:
        """End this actor."""
        ray.actor.exit_actor()


def forget_ended(folder: Path) -> None:
    """Remove the data of ended replicas from this node: adapters immediately, and whole folders beyond the newest KEPT ones."""
    ended = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime):
        with (path / "lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
        shutil.rmtree(path / "adapters", ignore_errors=True)
        ended.append(path)
    for path in ended[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)
