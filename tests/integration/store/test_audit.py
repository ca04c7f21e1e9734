"""Audit records are committed with the change that they describe, or not at all."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import select, text

from lmaas.audit import Action, Audit
from lmaas.errors import Conflict, LmaasError, NotFound
from lmaas.states import Observed
from lmaas.store import adapters, models, replicas, tenants
from lmaas.store.database import Database
from lmaas.store.scopes import SYSTEM
from lmaas.store.tables import audit_log
from lmaas.types import Role
from tests.integration.store.build import base_model, tenant, upload

Record = tuple[str | None, str, str | None, str | None, str, str]
COLUMNS = (
    audit_log.c.tenant_id,
    audit_log.c.actor,
    audit_log.c.key_id,
    audit_log.c.request_id,
    audit_log.c.action,
    audit_log.c.target,
)


def by(action: Action) -> Audit:
    """Return an action of an operator's key."""
    return Audit(action, Role.OPERATOR.value, "key_1", "req_1")


async def records(db: Database) -> list[Record]:
    """The audit log, oldest first."""
    async with db.begin(SYSTEM) as connection:
        return [tuple(row) for row in await connection.execute(select(*COLUMNS).order_by(audit_log.c.id))]


async def test_a_change_is_recorded_with_its_actor_and_request(db: Database) -> None:
    acme = await tenants.create_tenant(db, "acme", "standard", 1, 1, audit=by(Action.TENANT_CREATE))
    await models.put_base_model(
        db, models.BaseModel("", "b", "b", "float32", {}, 1, 1, 1, 1, 1, 1, ""), audit=Audit(Action.BASE_MODEL_REGISTER)
    )
    assert await records(db) == [
        (acme.id, "operator", "key_1", "req_1", "tenant.create", "acme"),
        (None, "system", None, None, "base_model.register", "b"),
    ]


async def test_what_changes_nothing_leaves_no_record(db: Database) -> None:
    acme = await tenant(db, "acme")
    model = await base_model(db)
    await upload(db, acme.id, "bot", model, content="0" * 64)
    key = await tenants.create_key(db, acme.id, Role.INFERENCE, "k", "hash", "prefix")
    await tenants.revoke_key(db, acme.id, key.id)
    await replicas.add_replica(db, "rep_1", model.id)
    await replicas.desire_stop(db, "rep_1")
    again: list[Callable[[], Awaitable[Any]]] = [
        lambda: tenants.update_tenant(db, acme.id, {"max_queued": acme.max_queued}, audit=by(Action.TENANT_CHANGE)),
        lambda: tenants.change_key(db, acme.id, key.id, {"max_concurrent": None}, audit=by(Action.KEY_CHANGE)),
        lambda: tenants.revoke_key(db, acme.id, key.id, audit=by(Action.KEY_REVOKE)),
        lambda: adapters.activate(db, acme.id, "bot", 1, audit=by(Action.ADAPTER_ACTIVATE)),
        lambda: upload(db, acme.id, "bot", model, content="0" * 64, audit=by(Action.ADAPTER_UPLOAD)),
        lambda: models.put_base_model(db, model, audit=by(Action.BASE_MODEL_REGISTER)),
        lambda: replicas.desire_stop(db, "rep_1", audit=by(Action.REPLICA_STOP)),
    ]
    for call in again:
        await call()
    assert await records(db) == []


async def test_a_change_that_fails_leaves_no_record(db: Database) -> None:
    acme = await tenant(db, "acme")
    model = await base_model(db)
    await upload(db, acme.id, "bot", model)
    await tenants.create_key(db, None, Role.OPERATOR, "k", "hash", "prefix")
    [operator] = await tenants.list_keys(db, None)
    await replicas.add_replica(db, "rep_1", model.id)
    await replicas.observe(db, "rep_1", Observed.STOPPED)
    calls: list[tuple[Callable[[], Awaitable[Any]], type[LmaasError]]] = [
        (lambda: tenants.create_tenant(db, "acme", "standard", 1, 1, audit=by(Action.TENANT_CREATE)), Conflict),
        (lambda: tenants.update_tenant(db, "ten_x", {"max_queued": 1}, audit=by(Action.TENANT_CHANGE)), NotFound),
        (lambda: tenants.delete_tenant(db, "ten_x", audit=by(Action.TENANT_DELETE)), NotFound),
        (lambda: tenants.create_key(db, acme.id, Role.INFERENCE, "k", "hash", "p", audit=by(Action.KEY_CREATE)), Conflict),
        (lambda: tenants.change_key(db, acme.id, operator.id, {"max_concurrent": 1}, audit=by(Action.KEY_CHANGE)), NotFound),
        (lambda: tenants.revoke_key(db, acme.id, operator.id, audit=by(Action.KEY_REVOKE)), NotFound),
        (lambda: tenants.revoke_key(db, None, operator.id, audit=by(Action.KEY_REVOKE)), Conflict),
        (lambda: adapters.activate(db, acme.id, "bot", 9, audit=by(Action.ADAPTER_ACTIVATE)), NotFound),
        (lambda: adapters.delete_adapter(db, acme.id, "x", audit=by(Action.ADAPTER_DELETE)), NotFound),
        (lambda: models.create_base_model(db, model, audit=by(Action.BASE_MODEL_CREATE)), Conflict),
        (lambda: models.change_base_model(db, model.id, {"dtype": "x"}, audit=by(Action.BASE_MODEL_CHANGE)), Conflict),
        (lambda: models.delete_base_model(db, model.id, audit=by(Action.BASE_MODEL_DELETE)), Conflict),
    ]
    for call, expected in calls:
        with pytest.raises(expected):
            await call()
    assert not await replicas.desire_stop(db, "rep_1", audit=by(Action.REPLICA_STOP))
    assert await records(db) == []


async def test_a_record_that_cannot_be_written_undoes_the_change(db: Database) -> None:
    acme = await tenant(db, "acme")
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text("ALTER TABLE audit_log ADD CONSTRAINT refused CHECK (action <> 'tenant.delete')"))
    with pytest.raises(Exception, match="refused"):
        await tenants.delete_tenant(db, acme.id, audit=by(Action.TENANT_DELETE))
    assert await tenants.get_tenant(db, acme.id) == acme


async def test_of_the_last_two_operator_keys_one_is_always_left(db: Database) -> None:
    for number in range(10):
        old = [key.id for key in await tenants.list_keys(db, None) if key.revoked_at is None]
        while len(old) < 2:
            old.append((await tenants.create_key(db, None, Role.OPERATOR, "k", f"hash{number}-{len(old)}", "p")).id)
        results = await asyncio.gather(*(tenants.revoke_key(db, None, key) for key in old), return_exceptions=True)
        [refused] = [result for result in results if isinstance(result, BaseException)]
        assert isinstance(refused, Conflict)
        assert refused.error_code == "last_operator_key"
        assert len([key for key in await tenants.list_keys(db, None) if key.revoked_at is None]) == 1


async def test_the_last_operator_key_can_be_revoked_by_force(db: Database) -> None:
    key = await tenants.create_key(db, None, Role.OPERATOR, "k", "hash", "p")
    with pytest.raises(Conflict):
        await tenants.revoke_key(db, None, key.id)
    assert (await tenants.revoke_key(db, None, key.id, force=True)).revoked_at is not None
    # It has been revoked already, and is not the last key of any kind.
    assert (await tenants.revoke_key(db, None, key.id)).revoked_at is not None
    # A tenant may be without keys.
    acme = await tenant(db, "acme")
    own = await tenants.create_key(db, acme.id, Role.TENANT_ADMIN, "k", "hash2", "p")
    assert (await tenants.revoke_key(db, acme.id, own.id)).revoked_at is not None
