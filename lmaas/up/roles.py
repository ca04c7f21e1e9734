"""Authentication of the embedded Postgres: each process of the service has its own role and password, and the user that runs `lmaas up` may
connect as the superuser."""

import json
import os
import pwd
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import make_url

from lmaas.config import Settings
from lmaas.errors import SettingsError
from lmaas.store.database import Database, driver_url
from lmaas.store.migrate import parse_passwords, upgrade
from lmaas.store.rights import LOGINS, DatabaseRole, role_name

#: The map of operating system users to the superuser.
MAP = "lmaas"
HBA = f"""\
# Written by lmaas at every start.
local all postgres peer map={MAP}
local all all scram-sha-256
"""


def require_authentication(folder: Path) -> None:
    """Configure the server with this data folder to require a password, or, for the superuser, the user that runs this process.

    Called before the server starts. Other users of the machine cannot connect, even if they can reach its socket.
    """
    user = pwd.getpwuid(os.geteuid()).pw_name.replace('"', '""')
    # initdb has created both files, so their owner and mode are kept.
    (folder / "pg_hba.conf").write_text(HBA)
    (folder / "pg_ident.conf").write_text(f'# Written by lmaas at every start.\n{MAP} "{user}" postgres\n')


@dataclass(frozen=True, slots=True)
class Logins:
    """The settings of this stack's processes, which differ in their database logins."""

    gateway: Settings
    controller: Settings
    jobs: Settings

    def database(self, role: DatabaseRole) -> Database:
        """Return the database with a gateway's or a controller's rights."""
        settings = {DatabaseRole.GATEWAY: self.gateway, DatabaseRole.CONTROLLER: self.controller}[role]
        return Database(str(settings.database_url), role, prefix=settings.database_role_prefix)


def prepare_database(settings: Settings, *, embedded: bool) -> Logins:
    """Migrate the database, and return each process's settings: in the embedded one, with a role and a password of its own.

    Elsewhere all processes use the address of the settings. Raises SettingsError or Unavailable.
    """
    url, prefix = str(settings.database_url), settings.database_role_prefix
    if not embedded:
        upgrade(url, prefix=prefix, passwords=parse_passwords(settings.database_passwords))
        return Logins(settings, settings, settings)
    passwords = _passwords(settings.home / "database-passwords.json")
    upgrade(url, prefix=prefix, passwords=passwords)

    def of(role: DatabaseRole) -> str:
        login = make_url(driver_url(url)).set(username=role_name(prefix, role), password=passwords[role], drivername="postgresql")
        return login.render_as_string(hide_password=False)

    return Logins(
        replace(settings, database_url=of(DatabaseRole.GATEWAY)),
        replace(settings, database_url=of(DatabaseRole.CONTROLLER), replica_database_url=of(DatabaseRole.REPLICA)),
        replace(settings, database_url=of(DatabaseRole.JOBS)),
    )


def _passwords(path: Path) -> dict[DatabaseRole, str]:
    """Read the roles' passwords, and create those that are missing. Existing ones are kept, because replicas of an earlier start may still
    use them."""
    try:
        known = json.loads(path.read_text())
    except FileNotFoundError:
        known = {}
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read: {error}. Delete it, and new passwords are made.") from error
    if not isinstance(known, dict):
        raise SettingsError(f"{path} does not hold passwords. Delete it, and new ones are made.")
    found = {role: str(known.get(role) or secrets.token_hex(32)) for role in LOGINS}
    if found != known:
        partial = path.with_name(path.name + ".partial")
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(found, file, indent=2)
        partial.replace(path)
    return found
