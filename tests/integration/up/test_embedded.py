"""The embedded servers: started, killed, started again, in folders with all kinds of names."""

import importlib.util
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
import redis
from sqlalchemy import create_engine, text

from lmaas.errors import SettingsError
from lmaas.process import bound_command
from lmaas.store.database import driver_url
from lmaas.up.embedded import started
from lmaas.up.postgres import LIBRARIES, PACKAGE, Postgres
from lmaas.up.server import Server
from lmaas.up.valkey import Valkey
from tests.support.conditions import until

ODD = "a space, 'quotes\" % #?&=ü"
LONG = "/".join(["long" * 20] * 4)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Ends what a test has started."""
    with ExitStack() as exits:
        yield exits


def query(server: Server, *statements: str) -> list[object]:
    """Run statements in one transaction, and return the values of the last one's rows."""
    engine = create_engine(driver_url(server.url))
    with engine.begin() as connection:
        for statement in statements:
            result = connection.execute(text(statement))
        rows = [row[0] for row in result] if result.returns_rows else []
    engine.dispose()
    return rows


def family(server: Server) -> list[psutil.Process]:
    assert server.process is not None
    return psutil.Process(server.process.pid).children(recursive=True)


@pytest.mark.parametrize("name", ["plain", ODD, LONG], ids=["plain", "odd", "long"])
@pytest.mark.parametrize("kind", [Postgres, Valkey])
def test_runs_in_a_folder_of_any_name(kind: Callable[[Path, Path], Server], name: str, tmp_path: Path) -> None:
    folder = tmp_path / name / "data"
    with started(kind(folder, folder.with_name("log"))) as server:
        if kind is Postgres:
            assert query(server, "SELECT 1") == [1]
        else:
            with redis.Redis.from_url(server.url) as client:
                assert client.set("key", "value")
        assert folder.is_relative_to(server.sockets) or server.sockets.resolve() == folder.resolve()
    wide = [path for path in [folder, *folder.rglob("*")] if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) & 0o077]
    assert not wide
    assert stat.S_IMODE((folder.with_name("log")).stat().st_mode) == 0o600


@pytest.mark.parametrize("whole_family", [False, True], ids=["postmaster", "all"])
def test_a_killed_postgres_starts_again_at_once_with_its_data(whole_family: bool, tmp_path: Path) -> None:
    with started(Postgres(tmp_path / "data", tmp_path / "log")) as server:
        query(server, "CREATE TABLE kept (number int)", "INSERT INTO kept VALUES (7)")
        url = server.url
        for _ in range(2):
            assert server.process is not None
            # A backend that does not notice the end of its postmaster, since it does not check.
            engine = create_engine(driver_url(url))
            connection = engine.connect()
            [busy] = connection.execute(text("SELECT pg_backend_pid()")).scalars()
            os.kill(busy, signal.SIGSTOP)
            for process in family(server) if whole_family else []:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            server.process.kill()
            server.process.wait()
            server.start()
            assert not psutil.pid_exists(busy) or psutil.Process(busy).status() == psutil.STATUS_ZOMBIE
            assert query(server, "SELECT number FROM kept") == [7]
            connection.invalidate()
            engine.dispose()
        assert server.url == url


def test_a_killed_valkey_starts_again_at_once_with_its_data(tmp_path: Path) -> None:
    with started(Valkey(tmp_path / "data", tmp_path / "log")) as server, redis.Redis.from_url(server.url) as client:
        client.set("key", "kept")
        client.execute_command("WAITAOF", 1, 0, 1000)
        for _ in range(2):
            assert server.process is not None
            server.process.kill()
            server.process.wait()
            server.start()
            assert client.get("key") == b"kept"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs Postgres as another user")
def test_root_uses_a_copy_of_programs_that_the_other_user_cannot_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.util.find_spec(PACKAGE)
    assert installed is not None
    assert installed.submodule_search_locations
    packages = Path(installed.submodule_search_locations[0]).parent
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    for part in (PACKAGE, LIBRARIES):
        (private / part).symlink_to(packages / part)
    monkeypatch.syspath_prepend(private)
    with tempfile.TemporaryDirectory(prefix="lmaas-copies-") as copies:
        Path(copies).chmod(0o755)
        monkeypatch.setattr("lmaas.up.postgres.COPIES", Path(copies))
        with started(Postgres(tmp_path / "data", tmp_path / "log")) as server:
            assert query(server, "SELECT 1") == [1]
            assert server.command()[0].startswith(copies)
        assert stat.S_IMODE(private.stat().st_mode) == 0o700, "it was not opened to others"


def test_a_data_folder_that_cannot_be_created_says_why(tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmaas.up.postgres.LOCALE", ["--encoding=nonsense"])
    with pytest.raises(SettingsError, match=r'cannot create its data folder .+: "nonsense" is not a valid server encoding name') as refused:
        stack.enter_context(started(Postgres(tmp_path / "data", tmp_path / "log")))
    assert "\n" not in refused.value.message
    assert not (tmp_path / "data.partial").exists()


async def test_postgres_ends_with_its_parent_and_the_next_one_takes_its_place(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from lmaas.up.postgres import LIBRARIES, PACKAGE, Postgres;"
        "server = Postgres(Path(sys.argv[1]), Path(sys.argv[2])); server.start(); print(server.process.pid, flush=True); time.sleep(600)"
    )
    command = bound_command([sys.executable, "-c", code, str(tmp_path / "data"), str(tmp_path / "log")])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:  # noqa: ASYNC220 (short)
        assert parent.stdout is not None
        postmaster = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    # The next start works whether the first postmaster still runs or not.
    with started(Postgres(tmp_path / "data", tmp_path / "log")) as server:
        assert query(server, "SELECT 1") == [1]
    await until(lambda: not postmaster.is_running() or postmaster.status() == psutil.STATUS_ZOMBIE, 10)
    assert "database system is shut down" in (tmp_path / "log").read_text()


def test_an_initdb_that_was_interrupted_is_done_again(tmp_path: Path) -> None:
    partial = tmp_path / "data.partial"
    partial.mkdir()
    (partial / "PG_VERSION").write_text("18\n")
    with started(Postgres(tmp_path / "data", tmp_path / "log")) as server:
        assert query(server, "SELECT 1") == [1]
    assert not partial.exists()


@pytest.mark.parametrize(
    ("kind", "file", "content", "complaint"),
    [
        (Postgres, "PG_VERSION", "16\n", r"holds the data of Postgres 16, and this release runs Postgres 18"),
        (
            Valkey,
            "appendonlydir/appendonly.aof.manifest",
            "nonsense",
            r"The queue \(Valkey\) did not start: The AOF manifest file .+\. Its log is .+log\.$",
        ),
    ],
)
def test_a_start_that_fails_says_why(
    kind: Callable[[Path, Path], Server], file: str, content: str, complaint: str, tmp_path: Path, stack: ExitStack
) -> None:
    path = tmp_path / "data" / file
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(SettingsError, match=complaint):
        stack.enter_context(started(kind(tmp_path / "data", tmp_path / "log")))


def test_a_postgres_that_cannot_start_quotes_its_log(tmp_path: Path, stack: ExitStack) -> None:
    with started(Postgres(tmp_path / "data", tmp_path / "log")):
        pass
    (tmp_path / "data" / "postgresql.conf").write_text("no_such_setting = 1\n")
    complaint = f'The database (Postgres) did not start: configuration file "{tmp_path}/data/postgresql.conf" contains errors'
    with pytest.raises(SettingsError, match=re.escape(complaint)):
        stack.enter_context(started(Postgres(tmp_path / "data", tmp_path / "log")))
