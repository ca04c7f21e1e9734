"""Child processes: they do not outlive their parent, and what they said last."""

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int | None = None) -> None:
    """Have the kernel kill this process when its parent dies (Linux only; elsewhere nothing happens).

    With `parent_pid`, exit at once if that parent is gone already. The setting survives exec, but not fork.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent_pid is not None and os.getppid() != parent_pid:
        sys.exit("the parent process is gone")


def bound_command(command: list[str]) -> list[str]:
    """`command`, wrapped so that it dies with this process."""
    return [sys.executable, "-m", __name__, str(os.getpid()), *command]


def last_words(log: Path) -> str:
    """Why a process of ours ended early, as it said itself: the last line of what it wrote, if that is none of its structured log. Empty if
    it said nothing, as one that was killed."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return "" if last.startswith("{") else last


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 (the command is our caller's own)
