"""Access to the embedded Postgres: the machine's users that may connect."""

import os
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import create_engine, make_url, text

from lmaas.config import Settings
from lmaas.errors import SettingsError
from lmaas.store.database import Database, driver_url
from lmaas.store.rights import DatabaseRole
from lmaas.store.scopes import OPERATOR, SYSTEM
from lmaas.up import embedded
from lmaas.up.roles import prepare_database


def as_nobody(target: str) -> str:
    """Connect as another user of the machine, and return the server's message."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = "connected"
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            psycopg.connect(target).close()
        except Exception as error:  # noqa: BLE001 (whatever it is, the parent reads it)
            said = repr(error)
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def new_database(postgres_url: str, name: str) -> str:
    engine = create_engine(driver_url(postgres_url), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return postgres_url.replace("/postgres?", f"/{name}?")


async def test_each_process_has_a_login_of_its_own(tmp_path: Path) -> None:
    with embedded.postgres(tmp_path / "postgres") as url:
        settings = Settings(home=tmp_path, database_url=url)
        logins = prepare_database(settings, embedded=True)
        controller = logins.controller
        urls = (logins.gateway.database_url, controller.database_url, controller.replica_database_url, logins.jobs.database_url)
        assert [make_url(str(each)).username for each in urls] == ["lmaas_gateway", "lmaas_controller", "lmaas_replica", "lmaas_jobs"]
        assert logins.gateway.replica_database_url is None
        for role in (DatabaseRole.GATEWAY, DatabaseRole.CONTROLLER):
            db = logins.database(role)
            async with db.begin(SYSTEM) as connection:
                assert (await connection.execute(text("SELECT session_user"))).scalar_one() == f"lmaas_{role}"
            await db.close()
        passwords = tmp_path / "database-passwords.json"
        assert passwords.stat().st_mode & 0o777 == 0o600
        kept = passwords.read_text()
        assert prepare_database(settings, embedded=True) == logins
        assert passwords.read_text() == kept
        wrong = make_url(str(logins.gateway.database_url)).set(password="wrong")
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(wrong.render_as_string(hide_password=False))
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(wrong.set(username="lmaas_owner").render_as_string(hide_password=False))
        for broken in ("{", "[]"):
            passwords.write_text(broken)
            with pytest.raises(SettingsError, match="Delete it"):
                prepare_database(settings, embedded=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_of_the_machine_gets_nothing(tmp_path: Path) -> None:
    # Every user may enter the folder, so the server is what refuses.
    with embedded.postgres(tmp_path / "postgres") as url:
        folder = tmp_path / "postgres"
        socket = folder / ".s.PGSQL.5432"
        for path in (socket, folder, *folder.parents):
            path.chmod(path.stat().st_mode | 0o777 if path in (socket, folder) else path.stat().st_mode | 0o055)
        try:
            for user in ("postgres", "lmaas_gateway", "nobody"):
                said = as_nobody(f"host={folder} user={user} dbname=postgres password=guess")
                assert "authentication failed" in said
        finally:
            folder.chmod(0o700)
        psycopg.connect(url).close()


async def test_elsewhere_one_address_serves_all(postgres_url: str, tmp_path: Path) -> None:
    url = new_database(postgres_url, "one_for_all")
    settings = Settings(home=tmp_path, database_url=url)
    logins = prepare_database(settings, embedded=False)
    assert logins.gateway == logins.controller == logins.jobs == settings
    # One login for all processes, even a superuser: each process still acts as its role.
    gateway = logins.database(DatabaseRole.GATEWAY)
    for scope, role in ((SYSTEM, "lmaas_gateway"), ("ten_1", "lmaas_gateway"), (OPERATOR, "lmaas_operator")):
        async with gateway.begin(scope) as connection:
            assert (await connection.execute(text("SELECT current_user"))).scalar_one() == role
    await gateway.close()


async def test_two_services_share_a_cluster(postgres_url: str, tmp_path: Path) -> None:
    first = Settings(home=tmp_path, database_url=new_database(postgres_url, "first"), database_role_prefix="first")
    second = replace(first, database_url=new_database(postgres_url, "second"), database_role_prefix="second")
    first = replace(first, database_passwords="gateway=secret-1")
    mine, _ = prepare_database(first, embedded=False), prepare_database(second, embedded=False)
    login = make_url(driver_url(str(first.database_url))).set(username="first_gateway", password="secret-1")
    db = Database(login.render_as_string(hide_password=False), DatabaseRole.GATEWAY, prefix="first")
    async with db.begin(OPERATOR) as connection:
        assert (await connection.execute(text("SELECT count(*) FROM tenants"))).scalar_one() == 0
    await db.close()
    elsewhere = login.set(database="second", drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(elsewhere) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("SELECT FROM tenants")
    assert mine.gateway.database_role_prefix == "first"
