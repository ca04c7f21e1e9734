"""`lmaas init`: the operator's key of the settings."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from sqlalchemy import select

from lmaas.audit import Action, Audit
from lmaas.config import Settings
from lmaas.engine.embedding_model import NAME
from lmaas.errors import SettingsError
from lmaas.keys import hash_key, new_key
from lmaas.store.database import Database
from lmaas.store.models import list_base_models
from lmaas.store.scopes import SYSTEM
from lmaas.store.tables import audit_log
from lmaas.store.tenants import create_key, create_tenant, find_principal, list_keys, revoke_key
from lmaas.types import Role
from lmaas.up.init import KEY_NAME, initialise, put_operator_key


async def test_everything_a_service_needs(settings: Settings, db: Database, model_folder: Path) -> None:
    key = new_key()
    settings = replace(settings, operator_key=key, model=str(model_folder))
    said = io.StringIO()
    for _ in range(2):
        await initialise(settings, Console(file=said, width=200))
    embedding = settings.cache.expanduser() / "models" / NAME
    assert [model.source for model in await list_base_models(db)] == [str(embedding), str(model_folder)]
    principal = await find_principal(db, hash_key(key))
    assert principal is not None
    assert principal.role is Role.OPERATOR
    assert len(await list_keys(db, None)) == 1
    assert "created" in said.getvalue()
    assert "unchanged" in said.getvalue()
    assert key not in said.getvalue()


async def test_a_model_may_be_a_folder_where_it_is_started(
    settings: Settings, db: Database, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parent)
    settings = replace(settings, operator_key=new_key(), model=model_folder.name, embedding_model="none")
    await initialise(settings, Console(file=io.StringIO()))
    assert [model.source for model in await list_base_models(db)] == [str(model_folder)]


@pytest.mark.parametrize("key", [None, "sk-lmaas-" + "x" * 40])
async def test_refused_before_anything_is_done(settings: Settings, db: Database, key: str | None) -> None:
    with pytest.raises(SettingsError, match="LMAAS_OPERATOR_KEY"):
        await initialise(replace(settings, operator_key=key), Console())
    assert await list_base_models(db) == []
    assert await list_keys(db, None) == []


async def test_the_audit_log_names_the_system(settings: Settings, db: Database, model_folder: Path) -> None:
    settings = replace(settings, operator_key=new_key(), model=str(model_folder), model_name="first")
    for _ in range(2):  # the second run changes nothing
        await initialise(settings, Console(file=io.StringIO()))
    await put_operator_key(db, new_key())
    async with db.begin(SYSTEM) as connection:
        columns = (audit_log.c.action, audit_log.c.actor, audit_log.c.key_id, audit_log.c.request_id)
        rows = [tuple(row) for row in await connection.execute(select(*columns).order_by(audit_log.c.id))]
    actions = ("base_model.register", "base_model.register", "key.create", "key.create", "key.revoke")
    assert rows == [(action, "system", None, None) for action in actions]


async def test_another_key_replaces_the_last_one(db: Database) -> None:
    old, new, other = new_key(), new_key(), new_key()
    await create_key(db, None, Role.OPERATOR, "somebody's", hash_key(other), "sk-lmaas-other")
    assert await put_operator_key(db, old) == "created"
    assert await put_operator_key(db, new) == "created"
    assert await find_principal(db, hash_key(old)) is None
    assert await find_principal(db, hash_key(new)) is not None
    assert await find_principal(db, hash_key(other)) is not None, "`lmaas init` must not revoke keys that were made in other ways"
    with pytest.raises(SettingsError, match="revoked"):
        await put_operator_key(db, old)
    assert await find_principal(db, hash_key(new)) is not None, "a failure must not lock the operator out"


async def test_an_operators_key_of_that_name_stays(db: Database) -> None:
    old, new, other = new_key(), new_key(), new_key()
    audit = Audit(Action.KEY_CREATE, "operator", "key_1", "req_1")
    await create_key(db, None, Role.OPERATOR, KEY_NAME, hash_key(other), "sk-lmaas-other", audit=audit)
    for key in (old, new):
        assert await put_operator_key(db, key) == "created"
    assert await find_principal(db, hash_key(old)) is None
    assert await find_principal(db, hash_key(other)) is not None


async def test_a_key_that_was_made_otherwise_is_taken_as_it_is(db: Database) -> None:
    key = new_key()
    made = await create_key(db, None, Role.OPERATOR, "console", hash_key(key), "sk-lmaas-made")
    assert await put_operator_key(db, key) == "unchanged"
    await revoke_key(db, None, made.id, force=True)
    with pytest.raises(SettingsError, match="revoked"):
        await put_operator_key(db, key)


async def test_a_tenants_key_does_not_become_the_operators(db: Database) -> None:
    key = new_key()
    tenant = await create_tenant(db, "acme", "standard", 8, 8)
    await create_key(db, tenant.id, Role.TENANT_ADMIN, "admin", hash_key(key), "sk-lmaas-acme")
    with pytest.raises(SettingsError, match="tenant's key"):
        await put_operator_key(db, key)
