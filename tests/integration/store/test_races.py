"""Simultaneous changes: one waits for the other, and then decides on the state that the other has left.

Each test holds a transaction with the first change, starts the second one, and ends the first when the second waits for it.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.audit import Action, Audit
from lmaas.errors import Conflict, LmaasError, NotFound
from lmaas.store import adapters, models, replicas, tenants
from lmaas.store.database import Database
from lmaas.store.models import BaseModel
from lmaas.store.scopes import OPERATOR, SYSTEM
from lmaas.types import Role
from tests.integration.store.build import base_model, tenant, upload
from tests.support.conditions import until

A, B = "a" * 64, "b" * 64
AUDIT = Audit(Action.ADAPTER_UPLOAD, "operator", "key_1", "req_1")


class First:
    """An open transaction, and a count of the changes that wait for it."""

    def __init__(self, db: Database, connection: AsyncConnection) -> None:
        self._db, self.connection = db, connection
        self._started = 0

    async def run(self, statement: str, **values: object) -> None:
        await self.connection.execute(text(statement), values)

    async def meets(self, second: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Start another change, and return when it waits for a lock."""
        task = asyncio.create_task(second)
        self._started += 1

        async def waits() -> bool:
            query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            async with self._db.begin(SYSTEM) as connection:
                return task.done() or (await connection.execute(text(query))).scalar_one() == self._started

        await until(waits, every_s=0.01)
        assert not task.done(), "it did not wait"
        return task


@asynccontextmanager
async def first(db: Database) -> AsyncIterator[First]:
    async with db.begin(SYSTEM) as connection:
        yield First(db, connection)


async def records(db: Database) -> int:
    async with db.begin(SYSTEM) as connection:
        return int((await connection.execute(text("SELECT count(*) FROM audit_log"))).scalar_one())


async def code_of(task: "asyncio.Task[Any]") -> str:
    with pytest.raises(LmaasError) as caught:
        await task
    return caught.value.error_code


# Keys and tenants.


async def test_a_key_is_not_created_for_a_tenant_that_is_being_deleted(db: Database, gateway_db: Database) -> None:
    acme = await tenant(db, "acme")
    async with first(db) as deletion:
        await deletion.run("UPDATE tenants SET deleted_at = now() WHERE id = :id", id=acme.id)
        creating = await deletion.meets(tenants.create_key(gateway_db, acme.id, Role.INFERENCE, "k", "hash", "sk", audit=AUDIT))
    assert await code_of(creating) == "tenant_not_found"
    assert await tenants.list_keys(db, acme.id) == []
    assert await records(db) == 0


async def test_a_key_that_is_being_created_is_revoked_with_its_tenant(db: Database, gateway_db: Database) -> None:
    acme = await tenant(db, "acme")
    async with first(db) as creation:
        await creation.run("SELECT id FROM tenants WHERE id = :id FOR SHARE", id=acme.id)
        await creation.run(
            "INSERT INTO api_keys (id, tenant_id, role, name, hash, prefix) VALUES ('key_1', :id, 'inference', '', 'h', 'sk')", id=acme.id
        )
        deleting = await creation.meets(tenants.delete_tenant(gateway_db, acme.id))
    await deleting
    [key] = await tenants.list_keys(db, acme.id)
    assert key.revoked_at is not None


async def test_a_key_that_is_being_revoked_stays_revoked(db: Database, gateway_db: Database) -> None:
    acme = await tenant(db, "acme")
    key = await tenants.create_key(db, acme.id, Role.INFERENCE, "k", "hash", "sk")
    async with first(db) as revocation:
        await revocation.run("UPDATE api_keys SET revoked_at = now() WHERE id = :id", id=key.id)
        again = await revocation.meets(tenants.revoke_key(gateway_db, acme.id, key.id, audit=AUDIT))
        changing = await revocation.meets(tenants.change_key(gateway_db, acme.id, key.id, {"max_concurrent": 2}))
    assert (await again).revoked_at is not None
    changed = await changing
    assert changed.limits.max_concurrent == 2
    assert changed.revoked_at is not None
    assert await records(db) == 0


async def test_a_tenant_that_is_being_changed_to_the_same_has_one_record(db: Database, gateway_db: Database) -> None:
    acme = await tenant(db, "acme")
    async with first(db) as change:
        await change.run("UPDATE tenants SET max_queued = 99 WHERE id = :id", id=acme.id)
        same = await change.meets(tenants.update_tenant(gateway_db, acme.id, {"max_queued": 99}, audit=AUDIT))
    assert (await same).max_queued == 99
    assert await records(db) == 0


async def test_an_id_counts_more_than_a_name(db: Database) -> None:
    """Older releases allowed names that look like ids."""
    acme, gone = await tenant(db, "acme"), await tenant(db, "gone")
    await tenants.delete_tenant(db, gone.id)
    of_acme, of_gone = await tenant(db, acme.id), await tenant(db, gone.id)
    assert (await tenants.get_tenant(db, acme.id)).id == acme.id
    with pytest.raises(NotFound):
        await tenants.get_tenant(db, gone.id)
    assert (await tenants.get_tenant(db, of_gone.id)).id == of_gone.id
    await tenants.delete_tenant(db, of_gone.id)
    assert (await tenants.get_deleted_tenant(db, gone.id)).id == gone.id
    await tenants.delete_tenant(db, acme.id)
    await tenants.delete_tenant(db, of_acme.id)
    assert (await tenants.get_deleted_tenant(db, acme.id)).id == acme.id


# Adapters.


async def test_a_version_is_not_activated_while_its_adapter_is_being_deleted(db: Database, gateway_db: Database) -> None:
    base, acme = await base_model(db), await tenant(db, "acme")
    await upload(db, acme.id, "bot", base, content=A, activate=False)
    async with first(db) as deletion:
        await deletion.run("DELETE FROM adapters")
        activating = await deletion.meets(adapters.activate(gateway_db, acme.id, "bot", 1, audit=AUDIT))
    assert await code_of(activating) == "adapter_not_found"
    assert await records(db) == 0


async def test_an_upload_of_what_is_being_activated_changes_nothing(db: Database, gateway_db: Database) -> None:
    base, acme = await base_model(db), await tenant(db, "acme")
    for content in (A, B):
        await upload(db, acme.id, "bot", base, content=content)
    async with first(db) as activation:
        await activation.run("UPDATE adapters SET live_version = 1")
        uploading = await activation.meets(upload(gateway_db, acme.id, "bot", base, content=A, audit=AUDIT))
        activating = await activation.meets(adapters.activate(gateway_db, acme.id, "bot", 1, audit=AUDIT))
    assert await uploading == 1
    assert (await activating).live_version == 1
    assert await records(db) == 0


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("UPDATE base_models SET max_lora_rank = 8", "base_model_changed"),
        ("UPDATE base_models SET linears = '{}'", "base_model_changed"),
        ("UPDATE base_models SET deleted_at = now()", "base_model_not_found"),
    ],
)
async def test_no_version_for_a_base_model_that_is_being_changed(db: Database, gateway_db: Database, change: str, code: str) -> None:
    base, acme = await base_model(db), await tenant(db, "acme")
    async with first(db) as changing:
        # A change and a deletion lock the model like this.
        await changing.run("SELECT id FROM base_models FOR UPDATE")
        await changing.run(change)
        uploading = await changing.meets(upload(gateway_db, acme.id, "bot", base, validated=base))
    assert await code_of(uploading) == code
    assert await adapters.list_adapters(db, acme.id) == []


async def test_a_base_model_that_is_being_changed_in_other_things_gets_its_version(db: Database, gateway_db: Database) -> None:
    base, acme = await base_model(db), await tenant(db, "acme")
    async with first(db) as changing:
        await changing.run("SELECT id FROM base_models FOR UPDATE")
        await changing.run("UPDATE base_models SET max_num_seqs = 9")
        uploading = await changing.meets(upload(gateway_db, acme.id, "bot", base, validated=base))
    assert await uploading == 1


async def test_a_name_is_a_base_models_or_adapters(db: Database, gateway_db: Database) -> None:
    base, acme, other = await base_model(db), await tenant(db, "acme"), await tenant(db, "other")
    async with first(db) as holder:
        await models.lock_name(holder.connection, "bot")
        attempts = [
            await holder.meets(models.create_base_model(gateway_db, await _like(base, "bot"))),
            await holder.meets(upload(gateway_db, acme.id, "bot", base)),
            await holder.meets(upload(gateway_db, other.id, "bot", base)),
        ]
    model, *uploads = await asyncio.gather(*attempts, return_exceptions=True)
    assert {isinstance(each, Conflict) for each in uploads} == {isinstance(model, BaseModel)}
    taken = [each for each in (model, *uploads) if isinstance(each, Conflict)]
    assert {error.error_code for error in taken} == {"name_taken"}
    assert [each.name for each in await models.list_base_models(db)] == ["base"] + ["bot"] * isinstance(model, BaseModel)


async def _like(base: BaseModel, name: str) -> BaseModel:
    values = {field: getattr(base, field) for field in BaseModel.__slots__}
    return BaseModel(**values | {"id": "", "name": name})


# Base models and replicas.


async def test_a_base_model_that_is_registered_twice_at_once_has_one_record(db: Database, gateway_db: Database) -> None:
    like = await _like(await base_model(db), "new")
    async with first(db) as holder:
        await models.lock_name(holder.connection, "new")
        registered = [await holder.meets(models.put_base_model(gateway_db, like, audit=AUDIT)) for _ in range(2)]
    one, two = await asyncio.gather(*registered)
    assert one == two
    assert await records(db) == 1


async def test_a_decision_on_what_is_being_changed_is_made_again(db: Database, gateway_db: Database) -> None:
    base = await base_model(db)
    async with first(db) as change:
        await change.run("UPDATE base_models SET max_cpu_loras = 3")
        late = await change.meets(models.change_base_model(gateway_db, base.id, {"max_loras": 4}, seen=base, audit=AUDIT))
        same = await change.meets(models.change_base_model(gateway_db, base.id, {"max_cpu_loras": 3}, audit=AUDIT))
    with pytest.raises(models.ChangedMeanwhile):
        await late
    assert (await same).max_loras == base.max_loras
    assert await records(db) == 0


async def test_a_replica_that_is_being_stopped_has_one_record(db: Database, gateway_db: Database) -> None:
    base = await base_model(db)
    await replicas.add_replica(db, "rep_1", base.id)
    async with first(db) as stop:
        await stop.run("UPDATE replicas SET desired = 'stopped'")
        again = await stop.meets(replicas.desire_stop(gateway_db, "rep_1", OPERATOR, audit=AUDIT))
    assert await again is True
    async with first(db) as end:
        await end.run("UPDATE replicas SET observed = 'failed', desired = 'running'")
        late = await end.meets(replicas.desire_stop(gateway_db, "rep_1", OPERATOR, audit=AUDIT))
    assert await late is False
    assert await records(db) == 0


async def test_no_replica_for_a_base_model_that_is_being_deleted(db: Database, controller_db: Database) -> None:
    base = await base_model(db)
    async with first(db) as deletion:
        await deletion.run("SELECT id FROM base_models FOR UPDATE")
        await deletion.run("UPDATE base_models SET deleted_at = now()")
        adding = await deletion.meets(replicas.add_replica(controller_db, "rep_1", base.id))
    assert await adding is False
