"""The CLI with an operator's and with a tenant's key: the tenant that a command concerns, and --force for the last operator's key."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lmaas.keys import hash_key
from lmaas.store.tenants import find_principal
from tests.integration.api.test_base_models import lmaas
from tests.integration.gateway.stack import Stack, running


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


async def test_the_last_operators_key_needs_force(stack: Stack, operator_key: str) -> None:
    code, out, err = await lmaas(stack, operator_key, "--json", "key", "create", "--name", "second")
    assert code == 0, err
    second = json.loads(out)
    assert second["role"] == "operator"
    code, out, err = await lmaas(stack, second["key"], "--json", "key", "list")
    [first] = {row["id"] for row in json.loads(out)} - {second["id"]}
    assert (await lmaas(stack, second["key"], "key", "revoke", first, "--yes"))[0] == 0
    assert await find_principal(stack.db, hash_key(operator_key)) is None

    code, out, err = await lmaas(stack, second["key"], "key", "revoke", second["id"], "--yes")
    assert (code, out) == (1, "")
    assert f"'{second['id']}' is the last operator's key" in err
    assert "`lmaas key create`" in err
    assert "--force" in err
    assert await find_principal(stack.db, hash_key(second["key"])) is not None
    code, out, err = await lmaas(stack, second["key"], "key", "revoke", second["id"], "--yes", "--force")
    assert code == 0, err
    assert await find_principal(stack.db, hash_key(second["key"])) is None


async def test_a_key_says_whose_resources_are_meant(stack: Stack, operator_key: str) -> None:
    tenant = await stack.tenant()
    created = await lmaas(stack, operator_key, "--json", "--tenant", tenant.id, "key", "create", "--role", "tenant_admin")
    admin = json.loads(created[1])
    for key, arguments, code in (
        (admin["key"], ["key", "list"], 0),
        (tenant.key, ["adapter", "list"], 0),
        (tenant.key, ["usage"], 0),
        (tenant.key, ["key", "list"], 1),
        (operator_key, ["usage"], 0),
        (operator_key, ["adapter", "list"], 2),
        (operator_key, ["--tenant", tenant.id, "adapter", "list"], 0),
        (operator_key, ["--tenant", tenant.id, "key", "list"], 0),
    ):
        done, out, err = await lmaas(stack, key, "--json", *arguments)
        assert done == code, err
        if code == 2:
            assert "Name the tenant: --tenant NAME." in err
        elif code == 1:
            assert "This needs a key of the role tenant_admin." in err
        elif arguments[-2:] == ["key", "list"]:
            assert {row["id"] for row in json.loads(out)} == {tenant.key_id, admin["id"]}
