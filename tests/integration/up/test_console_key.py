"""The key with which the console of a stack makes sessions of people."""

from dataclasses import replace

import pytest

from lmaas.config import Settings
from lmaas.errors import SettingsError
from lmaas.keys import hash_key, new_key
from lmaas.store.database import Database
from lmaas.store.tenants import find_principal, list_keys, revoke_key
from lmaas.types import Role
from lmaas.up.bootstrap import ensure_console_key
from lmaas.up.init import CONSOLE_KEY_NAME, put_operator_key
from lmaas.up.stack import of_console, with_console


async def test_it_is_made_once_and_again_when_it_was_revoked(settings: Settings, db: Database) -> None:
    assert await ensure_console_key(settings, db) is None
    settings = replace(settings, console_oidc_issuer="https://idp.test")
    key = await ensure_console_key(settings, db)
    assert key is not None
    principal = await find_principal(db, hash_key(key))
    assert principal is not None
    assert principal.role is Role.OPERATOR
    assert await ensure_console_key(settings, db) == key
    await revoke_key(db, None, principal.key_id, force=True)
    other = await ensure_console_key(settings, db)
    assert other not in (None, key)
    assert await ensure_console_key(replace(settings, console_key="given"), db) == "given"


async def test_init_registers_it_under_its_own_name(db: Database) -> None:
    key = new_key()
    assert await put_operator_key(db, key, CONSOLE_KEY_NAME) == "created"
    assert await put_operator_key(db, new_key()) == "created"
    assert await put_operator_key(db, key, CONSOLE_KEY_NAME) == "unchanged"
    assert [each.name for each in await list_keys(db, None) if each.revoked_at is None].count(CONSOLE_KEY_NAME) == 1
    assert await put_operator_key(db, new_key(), CONSOLE_KEY_NAME) == "created"
    assert await find_principal(db, hash_key(key)) is None
    await revoke_key(db, None, (await list_keys(db, None))[0].id, force=True)
    with pytest.raises(SettingsError, match="LMAAS_CONSOLE_KEY was revoked"):
        await put_operator_key(db, key, CONSOLE_KEY_NAME)


def test_the_console_of_a_stack_listens_for_the_gateway_only_and_knows_no_server(settings: Settings) -> None:
    stack = with_console(replace(settings, host="0.0.0.0"))  # noqa: S104 (not bound)
    assert stack.console_url == f"http://127.0.0.1:{stack.console_port}"
    console = of_console(stack)
    assert console.host == "127.0.0.1"
    environment = console.environment()
    assert environment["LMAAS_CONSOLE_API_URL"] == "http://127.0.0.1:8080/v1"
    assert {environment[name] for name in ("LMAAS_DATABASE_URL", "LMAAS_REDIS_URL", "LMAAS_REPLICA_DATABASE_URL")} == {""}
    assert with_console(replace(settings, console=False)).console_url is None
