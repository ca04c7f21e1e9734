"""The home folder of a stack. It is private, and locked by one `lmaas up` at a time."""

import fcntl
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmaas.errors import SettingsError

#: The permission bits of the group and of others.
OTHERS = 0o077
LOCK = "lock"
#: Entries that do not show that a folder is in use.
FOREIGN = frozenset({"lost+found"})


@contextmanager
def held(home: Path) -> Iterator[int]:
    """Prepare the home folder and hold its lock for the block. Yields the number of files in it that other users could read until now.

    Raises SettingsError if the folder cannot be used, or if another `lmaas up` holds the lock.
    """
    try:
        _prepare(home)
        file = os.fdopen(os.open(home / LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise _unusable(home, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            tightened = make_private(home)
        except BlockingIOError:
            message = f"Another `lmaas up` runs in {home}. Set LMAAS_HOME and LMAAS_PORT for a second one."
            raise SettingsError(message) from None
        except OSError as error:
            raise _unusable(home, error) from error
        yield tightened


def make_private(folder: Path) -> int:
    """Remove all rights of other users on a folder and everything in it, and return the number of entries that changed."""
    found = 0
    for parent, folders, files in os.walk(folder):
        for path in (parent, *(os.path.join(parent, name) for name in (*folders, *files))):
            mode = os.lstat(path).st_mode
            if mode & OTHERS and not stat.S_ISLNK(mode):
                os.chmod(path, stat.S_IMODE(mode) & ~OTHERS)
                found += 1
    return found


def user_name(uid: int) -> str:
    """Return a user's name, for messages."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"the user with the number {uid}"


def _prepare(home: Path) -> None:
    if not str(home).isprintable():
        raise SettingsError(
            f"The path of the home folder has characters that cannot be printed: {str(home)!r}. Set LMAAS_HOME to another one."
        )
    if home.exists() and not home.is_dir():
        raise SettingsError(f"{home} is not a folder. Set LMAAS_HOME to one.")
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    status, user = home.stat(), os.geteuid()
    if user != 0:
        _check_owner(home, status.st_uid, user)
    used = (home / LOCK).exists()
    if used:
        # Root may use another user's empty folder, but not that user's stack, whose files would become root's.
        _check_owner(home, (home / LOCK).stat().st_uid, user)
    # Never change the rights of a folder that serves other purposes, such as /tmp.
    if status.st_mode & OTHERS and not used and {path.name for path in home.iterdir()} - FOREIGN:
        raise SettingsError(f"{home} holds files of others, and lmaas would make it private. Set LMAAS_HOME to a new or an empty folder.")


def _check_owner(home: Path, owner: int, user: int) -> None:
    if owner != user:
        name = user_name(owner)
        message = f"{home} belongs to {name}, and you are {user_name(user)}. Run lmaas as {name}, or set LMAAS_HOME to another folder."
        raise SettingsError(message)


def _unusable(home: Path, error: OSError) -> SettingsError:
    where = error.filename or home
    return SettingsError(f"{where} cannot be used: {error.strerror}. Set LMAAS_HOME to a folder that you may write to.")
