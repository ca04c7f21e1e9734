"""Child processes that end with their parent, private files, and the last line of a process's log."""

import ctypes
import os
import pwd
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
#: A placeholder in a wrapped command for a user or a folder that is not given.
_NONE = "-"


def private_files() -> None:
    """Make all files of this process and its children accessible to their owner only, regardless of the inherited umask."""
    os.umask(0o077)


def die_with_parent(parent_pid: int | None = None, with_signal: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends (Linux only; elsewhere this has no effect).

    With `parent_pid`, exit immediately if that parent has ended already. The setting survives exec, but neither fork nor a change of user.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(with_signal), 0, 0, 0)
    if parent_pid is not None and os.getppid() != parent_pid:
        sys.exit("the parent process is gone")


def bound_command(
    command: list[str], *, with_signal: int = signal.SIGKILL, user: str | None = None, folder: Path | None = None
) -> list[str]:
    """Return `command`, wrapped so that it gets `with_signal` when the thread that starts it ends.

    With `user`, it runs as that user, which only root may request. `folder` is its working folder, which that user need not be able to
    reach by its path.
    """
    wrapper = [sys.executable, "-m", __name__, str(os.getpid()), str(int(with_signal)), user or _NONE, str(folder or _NONE)]
    return [*wrapper, *command]


def _run_bound(parent_pid: int, with_signal: int, user: str, folder: str, command: list[str]) -> None:
    if folder != _NONE:
        os.chdir(folder)
    if user != _NONE:
        entry = pwd.getpwnam(user)
        os.setgroups([])
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    die_with_parent(parent_pid, with_signal)
    os.execv(command[0], command)  # noqa: S606 (the command is our caller's own)


def last_words(log: Path) -> str:
    """Return the last line of a log file, which explains why a process of the service ended early. Return an empty string if that line is a
    record of the structured log, or if there is none, as after a kill."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return "" if last.startswith("{") else last


if __name__ == "__main__":
    _run_bound(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
