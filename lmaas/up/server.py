"""An embedded server: a child process that keeps its data in one folder and listens on a Unix socket."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

from lmaas.errors import SettingsError
from lmaas.process import bound_command

#: The time that a start may take, including recovery after a crash.
START_S = 120.0
#: The time that a server may take to stop before it is killed.
STOP_S = 20.0
#: The maximum length of the path of a folder with a socket, whose address has room for 107 bytes. The longest name of a socket is that of
#: Postgres.
ADDRESS_BYTES = 107 - len("/.s.PGSQL.5432")
#: Characters that need no quoting in a URL and do not separate hosts for Postgres.
PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+@-]+")
#: The server's name for its working folder. The server's user need not be able to reach the folder by its path.
HERE = "/proc/self/cwd"
#: With less free space than this on its disk, a failure of a server is most likely caused by the full disk.
FULL_BYTES = 32 * 1024 * 1024


class Server(ABC):
    """A Postgres or a Valkey of this stack. The caller holds the folder's lock.

    The server is bound to the thread that starts it, and ends with that thread. Its address stays the same after a restart.
    """

    #: The name of the server in messages.
    title: ClassVar[str]
    #: The signal for an orderly shutdown that does not wait for clients.
    stop_signal: ClassVar[int] = signal.SIGTERM
    #: The pattern of log lines that explain a failure.
    complaint: ClassVar[re.Pattern[str]]

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        self.process: subprocess.Popen[bytes] | None = None
        self._exits = ExitStack()
        #: A short alias of the folder, without special characters, for the socket's address.
        self.sockets = self._short(folder)
        self._log_began = 0

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL for clients."""

    @abstractmethod
    def command(self) -> list[str]:
        """Return the command that runs the server in the foreground, with `folder` as its working folder."""

    def prepare(self) -> None:
        """Prepare the folder for a start. Called before each start, while the server does not run. Raises SettingsError."""
        _make_folder(self.folder)

    def user(self) -> str | None:
        """Return the user that the server has to run as, or None for the user that runs `lmaas up`."""
        return None

    def answers(self) -> bool:
        """Return whether clients can use the server now."""
        raise NotImplementedError

    def launch(self) -> None:
        """Start the process and return without waiting for its first response. Raises SettingsError if it cannot be started."""
        try:
            self.prepare()
            _make_folder(self.log.parent)
            self._log_began = self.log.stat().st_size if self.log.exists() else 0
            with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as log:
                self.process = subprocess.Popen(
                    bound_command(self.command(), with_signal=self.stop_signal, user=self.user(), folder=self.folder),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    umask=0o077,
                )
        except OSError as error:
            raise SettingsError(f"{self.title} cannot be started: {error}.") from error

    def start(self) -> None:
        """Start the server and wait until it responds. Raises SettingsError if it does not."""
        self.launch()
        deadline = time.monotonic() + START_S
        while not self.answers():
            if not self.running or time.monotonic() > deadline:
                raise SettingsError(f"{self.title} did not start: {self.failure()}")
            time.sleep(0.02)

    @property
    def running(self) -> bool:
        """True while the process exists."""
        return self.process is not None and self.process.poll() is None

    def failure(self) -> str:
        """Return the reason why the server ended or does not respond, from its log, and the path of the log."""
        full = f"The disk of {self.folder} is full. " if is_full(self.folder) else ""
        why = self._complaint() or ("" if full else "it has not written why")
        return f"{full}{why.rstrip('.')}{'. ' if why else ''}Its log is {self.log}."

    def stop(self) -> None:
        """Stop the server in an orderly way, or kill it after STOP_S seconds, and remove its address."""
        if self.process is not None:
            self.process.send_signal(self.stop_signal)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._exits.close()

    def _complaint(self) -> str:
        try:
            with self.log.open("rb") as log:
                log.seek(self._log_began)
                lines = [line.strip() for line in log.read(1024 * 1024).decode(errors="replace").splitlines() if line.strip()]
        except OSError:
            return ""
        complaints = [match[1] for line in lines if (match := self.complaint.search(line))]
        found = complaints[0] if complaints else lines[-1] if lines else ""
        return found.replace(HERE, str(self.folder))

    def _short(self, folder: Path) -> Path:
        if _is_plain(folder):
            return folder
        for place in (None, "/tmp"):  # noqa: S108 (a new folder in it, with a name that cannot be guessed)
            short = Path(tempfile.mkdtemp(prefix="lmaas-", dir=place))
            self._exits.callback(shutil.rmtree, short, ignore_errors=True)
            if _is_plain(short / "data"):
                break
        else:
            raise SettingsError(f"The temporary folder {tempfile.gettempdir()} has a long or unusual name. Set TMPDIR to another one.")
        (short / "data").symlink_to(folder)
        # systemd-tmpfiles removes old files from temporary folders, but skips locked folders.
        held = os.open(short, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._exits.callback(os.close, held)
        fcntl.flock(held, fcntl.LOCK_SH)
        return short / "data"


def is_full(folder: Path) -> bool:
    """Return whether the disk of a folder has too little space for the servers to write."""
    return shutil.disk_usage(folder).free < FULL_BYTES


def _is_plain(folder: Path) -> bool:
    return len(os.fsencode(folder)) <= ADDRESS_BYTES and PLAIN_PATH.fullmatch(str(folder)) is not None


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
