"""`lmaas init`: register the base models and the operator's key of a service that runs without `lmaas up`."""

from rich.console import Console

from lmaas.audit import SYSTEM_ACTOR, Action, Audit
from lmaas.config import Settings
from lmaas.errors import Conflict, SettingsError
from lmaas.keys import check_given_key, hash_key, shown_prefix
from lmaas.store.audit import targets
from lmaas.store.database import Database
from lmaas.store.rights import DatabaseRole
from lmaas.store.tenants import create_key, find_principal, list_keys, revoke_key
from lmaas.types import Role
from lmaas.up.bootstrap import register_embedding_model, register_model

#: The names of the keys, by which a later run finds the key to replace, among those that no operator made.
KEY_NAME = "LMAAS_OPERATOR_KEY"
CONSOLE_KEY_NAME = "LMAAS_CONSOLE_KEY"


async def initialise(settings: Settings, console: Console) -> None:
    """Prepare and register the base models, and register the operator's key of the settings, and the console's if there is one. Safe to run
    repeatedly.

    Raises SettingsError without a database, for a key that could be guessed, or for a model that is not available.
    """
    if settings.database_url is None or settings.operator_key is None:
        raise SettingsError("Set LMAAS_DATABASE_URL and LMAAS_OPERATOR_KEY.")
    keys = {KEY_NAME: check_given_key(settings.operator_key)}
    if settings.console_key is not None:
        keys[CONSOLE_KEY_NAME] = check_given_key(settings.console_key, CONSOLE_KEY_NAME)
    if len(set(keys.values())) < len(keys):
        raise SettingsError(f"{KEY_NAME} and {CONSOLE_KEY_NAME} are the same key. Give the console a key of its own.")
    # This needs the rights of the management API, and looks up a key.
    db = Database(settings.database_url, DatabaseRole.GATEWAY, prefix=settings.database_role_prefix, connections=1)
    try:
        model = await register_model(settings, db, console)
        console.print(f"base model {model.name}: registered")
        if (embedding := await register_embedding_model(settings, db, console)) is not None:
            console.print(f"base model {embedding.name}: registered")
        for name, key in keys.items():
            whose = "operator" if name == KEY_NAME else "console"
            console.print(f"{whose} key {shown_prefix(key)}…: {await put_operator_key(db, key, name)}")
    finally:
        await db.close()


async def put_operator_key(db: Database, key: str, name: str = KEY_NAME) -> str:
    """Register the key and revoke the one that an earlier call registered by this name; return `created` or `unchanged`.

    Keys that earlier calls registered are found in the audit log. A key that an operator created is kept, even if it has the same name.

    Raises SettingsError if the key was revoked, or is a tenant's key.
    """
    known = await find_principal(db, hash_key(key))
    if known is not None and known.role is not Role.OPERATOR:
        raise SettingsError(f"{name} is a tenant's key. Set another one.")
    made = await targets(db, Action.KEY_CREATE, SYSTEM_ACTOR)
    mine = [entry for entry in await list_keys(db, None) if entry.name == name and entry.id in made and entry.revoked_at is None]
    if known is None:
        try:
            await create_key(db, None, Role.OPERATOR, name, hash_key(key), shown_prefix(key), audit=Audit(Action.KEY_CREATE))
        except Conflict:
            raise SettingsError(f"{name} was revoked and cannot be used again. Set another one.") from None
    for entry in mine:
        if known is None or entry.id != known.key_id:
            await revoke_key(db, None, entry.id, audit=Audit(Action.KEY_REVOKE))
    return "created" if known is None else "unchanged"
