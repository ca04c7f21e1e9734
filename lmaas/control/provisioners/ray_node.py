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

#: The folders of so many replicas that ended stay on a node, for whoever asks why.
KEPT = 20


class NodeReplica:
    """Starts the supervisor of a replica on this node, and ends when it ends.

    The supervisor leads a session of its own, with signals of its own, and dies with this process, as its engine dies with it: whether Ray
    kills the actor or the node fails, nothing stays. Its home is `home` on this node's disk: logs, and the adapters that it has fetched.
    """

    def __init__(self, replica_id: str, environment: dict[str, str], home: str) -> None:
        root = Path(home).expanduser().absolute()
        root.mkdir(parents=True, mode=0o700, exist_ok=True)
        folder = root / "replicas" / replica_id
        with (root / "lock").open("wb") as one_at_a_time:
            fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
            folder.mkdir(parents=True)
            # Held for as long as this process lives.
            self._lock = (folder / "lock").open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            forget_ended(root / "replicas")
        # The node's own variables stay (credentials of the object store, what Ray says of accelerators), but our settings are the stack's.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX) or name in ENGINE_VARIABLES}
        own = {"LMAAS_HOME": str(root), "LMAAS_ENGINE_HOST": ray.util.get_node_ip_address()}
        self._log = folder / "supervisor.log"
        with self._log.open("ab") as log:
            # By the main thread, which lasts: a child is bound to the thread that started it.
            self._supervisor = subprocess.Popen(
                bound_command([sys.executable, "-m", "lmaas", "supervise", replica_id]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=inherited | environment | own,
            )
        self._leaving = False
        # Its own caller: who started it may be gone before it has a node.
        ray.get_runtime_context().current_actor.watch.remote()

    def watch(self) -> str:
        """Wait for the supervisor's end, and have this actor end. Answers why it ended, for whoever may still ask."""
        code = self._supervisor.wait()
        if not self._leaving:
            # Behind the calls that wait here already, so that they get their answers; and once, for an actor with a call to itself stays.
            self._leaving = True
            ray.get_runtime_context().current_actor.leave.remote()
        return last_words(self._log) or f"it ended with code {code}"

    def leave(self) -> None:
        """End this actor."""
        ray.actor.exit_actor()


def forget_ended(folder: Path) -> None:
    """Remove what replicas have left that ended on this node: the adapters at once, the rest when there are many of them."""
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
