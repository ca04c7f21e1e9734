"""The command lines of engines that a zygote is prepared for, kept in a file beside its socket."""

import json
import os
from pathlib import Path

#: The module of vLLM's server. Only its command lines are prepared for.
SERVER = "vllm.entrypoints.launchers.api_server.entry"
#: How many are remembered, and prepared for.
REMEMBERED = 8
_WHERE = ("--port", "--host")


def command_key(arguments: list[str]) -> list[str]:
    """A command line without where the server listens, in which engines of one pool differ."""
    return [
        argument for before, argument in zip(["", *arguments], arguments, strict=False) if argument not in _WHERE and (before not in _WHERE)
    ]


def read_commands(path: Path) -> list[list[str]]:
    """The command lines in the file, the last used first; none if it cannot be read."""
    try:
        found = json.loads(path.read_text())
        return [[str(argument) for argument in command] for command in found][:REMEMBERED]
    except (OSError, ValueError, TypeError):
        return []


def remember(path: Path, command: list[str]) -> None:
    """Put a command line first in the file. Raises OSError."""
    before = read_commands(path)
    known = [command, *(other for other in before if other != command)][:REMEMBERED]
    if known != before:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(known))
        partial.rename(path)
