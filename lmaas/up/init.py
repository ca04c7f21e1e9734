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

#: The name of the key, by which a later run finds the key to replace, among those that no operator made.
KEY_NAME = "LMAAS_OPERATOR_KEY"


async def initialise(settings: Settings, console: Console) -> None:
    """Prepare and register the base models, and register the operator's key of the settings. Safe to run repeatedly.

    Raises SettingsError without a database, for a key that could be guessed, or for a model that is not available.
    """
    if settings.database_url is None or settings.operator_key is None:
        raise SettingsError("Set LMAAS_DATABASE_URL and LMAAS_OPERATOR_KEY.")
    key = check_given_key(settings.operator_key)
    # This needs the rights of the management API, and looks up a key.
    db = Database(settings.database_url, DatabaseRole.GATEWAY, prefix=settings.database_role_prefix, connections=1)
    try:
        model = await register_model(settings, db, console)
        console.print(f"base model {model.name}: registered")
        if (embedding := await register_embedding_model(settings, db, console)) is not None:
            console.print(f"base model {embedding.name}: registered")
        console.print(f"operator key {shown_prefix(key)}…: {await put_operator_key(db, key)}")
    finally:
        await db.close()


async def put_operator_key(db: Database, key: str) -> str:
    """Register the key and revoke the one that an earlier call registered; return `created` or `unchanged`.

    Keys that earlier calls registered are found in the audit log. A key that an operator created is kept, even if it has the same name.

    Raises SettingsError if the key was revoked, or is a tenant's key.
    """
    known = await find_principal(db, hash_key(key))
    if known is not None and known.role is not Role.OPERATOR:
        raise SettingsError("LMAAS_OPERATOR_KEY is a tenant's key. Set another one.")
    made = await targets(db, Action.KEY_CREATE, SYSTEM_ACTOR)
    mine = [entry for entry in await list_keys(db, None) if entry.name == KEY_NAME and entry.id in made and entry.revoked_at is None]
    if known is None:
        try:
            await create_key(db, None, Role.OPERATOR, KEY_NAME, hash_key(key), shown_prefix(key), audit=Audit(Action.KEY_CREATE))
        except Conflict:
            raise SettingsError("LMAAS_OPERATOR_KEY was revoked and cannot be used again. Set another one.") from None
    for entry in mine:
        if known is None or entry.id != known.key_id:
            await revoke_key(db, None, entry.id, audit=Audit(Action.KEY_REVOKE))
    return "created" if known is None else "unchanged"
