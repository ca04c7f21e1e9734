"""The command lines of engines that a zygote prepares for, stored in a file beside its socket."""

import json
import os
from pathlib import Path

#: The module of vLLM's server. The zygote prepares for its command lines only.
SERVER = "vllm.entrypoints.launchers.api_server.entry"
#: The maximum number of command lines in the file.
REMEMBERED = 8
_WHERE = ("--port", "--host")


def command_key(arguments: list[str]) -> list[str]:
    """Return a command line without the server's address and port, in which engines of one pool differ."""
    return [
        argument for before, argument in zip(["", *arguments], arguments, strict=False) if argument not in _WHERE and (before not in _WHERE)
    ]


def read_commands(path: Path) -> list[list[str]]:
    """Return the command lines in the file, most recently used first. An unreadable file gives an empty list."""
    try:
        found = json.loads(path.read_text())
        return [[str(argument) for argument in command] for command in found][:REMEMBERED]
    except (OSError, ValueError, TypeError):
        return []


def remember(path: Path, command: list[str]) -> None:
    """Move a command line to the first place of the file, or add it there. Raises OSError."""
    before = read_commands(path)
    known = [command, *(other for other in before if other != command)][:REMEMBERED]
    if known != before:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(known))
        partial.rename(path)
