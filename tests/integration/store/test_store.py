"""Queries on a real Postgres."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import text

from lmaas.error_bodies import openai_body
from lmaas.errors import Conflict, InvalidRequest, LmaasError, NotFound, TooLarge, Unavailable
from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.states import TERMINAL, TRANSITIONS, Desired, Observed, UsageDimension, UsageStatus, WorkClass
from lmaas.store import adapters, replicas, tenants, usage, usage_days
from lmaas.store.database import Database
from lmaas.store.models import change_base_model, get_base_model, list_base_models
from lmaas.store.paging import Part
from lmaas.store.scopes import OPERATOR, SYSTEM
from lmaas.types import Principal, Role
from tests.integration.store.build import base_model, tenant, upload, usage_event

A, B, C = "a" * 64, "b" * 64, "c" * 64


async def settled(*attempts: Any) -> list[Any]:
    """Return the results of calls that run at once, or the codes of their errors."""
    results = await asyncio.gather(*attempts, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, LmaasError):
            raise result
    return [result.error_code if isinstance(result, LmaasError) else result for result in results]


async def add_key(db: Database, tenant_id: str | None, role: Role = Role.INFERENCE) -> tuple[str, str]:
    key = new_key()
    stored = await tenants.create_key(db, tenant_id, role, "k", hash_key(key), shown_prefix(key))
    assert stored.prefix == key[: len(stored.prefix)] != key
    return key, stored.id


# Tenants and keys.


async def test_a_tenants_life(db: Database) -> None:
    acme = await tenants.create_tenant(db, "acme", "gold", 7, 3)
    assert (acme.name, acme.tier, acme.max_queued, acme.max_adapters) == ("acme", "gold", 7, 3)
    assert await tenants.get_tenant(db, acme.id) == await tenants.get_tenant(db, "acme") == acme
    with pytest.raises(Conflict) as caught:
        await tenants.create_tenant(db, "acme", "gold", 1, 1)
    assert caught.value.error_code == "tenant_exists"
    changed = await tenants.update_tenant(db, acme.id, {"max_queued": 9})
    assert (changed.max_queued, changed.tier) == (9, "gold")
    assert await tenants.list_tenants(db) == [changed]
    await tenants.delete_tenant(db, acme.id)
    assert await tenants.list_tenants(db) == []
    for attempt in (
        tenants.get_tenant(db, "acme"),
        tenants.get_tenant(db, acme.id),
        tenants.update_tenant(db, acme.id, {"max_queued": 1}),
        tenants.delete_tenant(db, acme.id),
        tenants.delete_tenant(db, "ten_nobody"),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert (await tenants.create_tenant(db, "acme", "gold", 1, 1)).id != acme.id


async def test_two_tenants_of_one_name_at_once(db: Database) -> None:
    results = await settled(*(tenant(db, "acme") for _ in range(4)))
    assert sum(result == "tenant_exists" for result in results) == 3


async def test_who_holds_a_key(db: Database) -> None:
    acme, other = await tenant(db, "acme"), await tenant(db, "other")
    key, key_id = await add_key(db, acme.id, Role.TENANT_ADMIN)
    operator, _ = await add_key(db, None, Role.OPERATOR)
    assert await tenants.find_principal(db, hash_key(key)) == Principal(key_id, Role.TENANT_ADMIN, acme.id, "acme", 10, "standard")
    found = await tenants.find_principal(db, hash_key(operator))
    assert found is not None
    assert (found.role, found.tenant_id, found.tenant_name, found.max_queued) == (Role.OPERATOR, None, None, 0)
    for wrong in (key, hash_key(key + "x"), hash_key(key).upper(), "", "' OR '1'='1"):
        assert await tenants.find_principal(db, wrong) is None
    for stranger in (other.id, None):
        with pytest.raises(NotFound):
            await tenants.revoke_key(db, stranger, key_id)
    assert await tenants.find_principal(db, hash_key(key)) is not None
    first = await tenants.revoke_key(db, acme.id, key_id)
    assert await tenants.revoke_key(db, acme.id, key_id) == first
    assert await tenants.find_principal(db, hash_key(key)) is None
    assert [one.id for one in await tenants.list_keys(db, acme.id)] == [key_id]
    assert await tenants.list_keys(db, other.id) == []
    assert len(await tenants.list_keys(db, None)) == 1


async def test_a_deleted_tenants_keys_stop_at_once(db: Database) -> None:
    acme, other = await tenant(db, "acme"), await tenant(db, "other")
    key, _ = await add_key(db, acme.id)
    others, _ = await add_key(db, other.id)
    await tenants.delete_tenant(db, acme.id)
    with pytest.raises(NotFound):
        await add_key(db, acme.id)
    assert await tenants.find_principal(db, hash_key(key)) is None
    assert await tenants.find_principal(db, hash_key(others)) is not None


# Adapters.


async def test_versions_and_the_live_one(db: Database) -> None:
    base, acme = await base_model(db), await tenant(db, "acme")
    assert [await upload(db, acme.id, "bot", base, content=content) for content in (A, B)] == [1, 2]
    assert await upload(db, acme.id, "bot", base, content=C, activate=False) == 3
    found = await adapters.get_adapter(db, acme.id, "bot")
    assert (found.live_version, found.latest_version, found.base_model) == (2, 3, "base")
    assert [(one.version, one.content_hash) for one in await adapters.list_versions(db, acme.id, "bot")] == [(1, A), (2, B), (3, C)]
    await adapters.activate(db, acme.id, "bot", 1)
    served = await adapters.find_served(db, acme.id, "bot", None)
    assert served is not None
    assert (served.version, served.content_hash, served.base_model_id) == (1, A, base.id)
    with pytest.raises(NotFound):
        await adapters.activate(db, acme.id, "bot", 4)
    with pytest.raises(NotFound):
        await adapters.activate(db, acme.id, "bot", 0)
    other = await base_model(db, "other-base")
    with pytest.raises(Conflict) as caught:
        await upload(db, acme.id, "bot", other)
    assert caught.value.error_code == "base_model_conflict"


async def test_uploads_at_once_get_different_versions(db: Database) -> None:
    base, acme = await base_model(db), await tenant(db, "acme")
    assert sorted(await settled(*(upload(db, acme.id, "bot", base) for _ in range(6)))) == [1, 2, 3, 4, 5, 6]


async def test_content_that_a_version_has_is_that_version(db: Database) -> None:
    base, acme, other = await base_model(db), await tenant(db, "acme"), await tenant(db, "other")
    for content in (A, B, C):
        await upload(db, acme.id, "bot", base, content=content)

    async def live(content: str, *, activate: bool) -> tuple[int, int | None, int]:
        version = await upload(db, acme.id, "bot", base, content=content, activate=activate)
        found = await adapters.get_adapter(db, acme.id, "bot")
        return version, found.live_version, found.latest_version

    assert await live(C, activate=True) == (3, 3, 3)
    assert await live(A, activate=False) == (1, 3, 3)
    assert await live(A, activate=True) == (1, 1, 3)
    assert await live(B, activate=True) == (2, 2, 3)
    # Only the adapter's own versions count.
    assert await upload(db, acme.id, "twin", base, content=B) == 1
    assert await upload(db, other.id, "bot", base, content=B) == 1


async def test_the_same_content_at_once_is_one_version(db: Database) -> None:
    base, acme = await base_model(db), await tenant(db, "acme")
    assert await settled(*(upload(db, acme.id, "bot", base, content=A) for _ in range(6))) == [1] * 6
    assert sorted(await settled(*(upload(db, acme.id, "bot", base, content=content) for content in (A, B, B, C, C)))) == [1, 2, 2, 3, 3]
    assert len(await adapters.list_versions(db, acme.id, "bot")) == 3


async def test_the_quota_holds_also_at_once(db: Database) -> None:
    base, acme = await base_model(db), await tenant(db, "acme", max_adapters=2)
    results = await settled(*(upload(db, acme.id, f"bot{number}", base) for number in range(5)))
    assert sorted(map(str, results)) == ["1", "1", "too_many_adapters", "too_many_adapters", "too_many_adapters"]
    names = [one.name for one in await adapters.list_adapters(db, acme.id)]
    assert len(names) == 2
    assert await upload(db, acme.id, names[0], base) == 2  # versions are not counted
    await adapters.delete_adapter(db, acme.id, names[0])
    assert await upload(db, acme.id, "new", base) == 1
    with pytest.raises(TooLarge):
        await upload(db, acme.id, "newer", base)


async def test_what_nobody_uses_any_more_may_be_deleted(db: Database) -> None:
    base, acme, other = await base_model(db), await tenant(db, "acme"), await tenant(db, "other")
    for name, content in (("bot", A), ("bot", B), ("twin", B)):
        await upload(db, acme.id, name, base, content=content)
    await upload(db, other.id, "bot", base, content=A)
    assert await adapters.delete_adapter(db, acme.id, "bot") == [A, B]
    for owner, expected in ((acme, [A, C]), (other, [B, C])):
        async with adapters.unused(db, owner.id, [C, B, A, C]) as unused:
            assert unused == expected
    assert await adapters.find_served(db, acme.id, "bot", None) is None
    assert await adapters.find_served(db, other.id, "bot", None) is not None
    assert await adapters.delete_adapter(db, acme.id, "twin") == [B]
    assert await upload(db, acme.id, "bot", base) == 1  # another adapter, although its name is the same


async def test_nothing_comes_into_use_while_its_files_are_deleted(db: Database) -> None:
    base, acme = await base_model(db), await tenant(db, "acme")
    async with adapters.unused(db, acme.id, [A]) as unused:
        assert unused == [A]
        uploading = asyncio.create_task(upload(db, acme.id, "bot", base, content=A))
        await asyncio.sleep(0.1)
        assert not uploading.done()
    assert await uploading == 1
    async with adapters.unused(db, acme.id, [A]) as unused:
        assert unused == []


async def test_adapters_are_each_tenants_own(db: Database) -> None:
    base, acme, other = await base_model(db), await tenant(db, "acme"), await tenant(db, "other")
    await upload(db, acme.id, "bot", base)
    assert await adapters.find_served(db, other.id, "bot", None) is None
    assert await adapters.find_served(db, other.id, "bot", 1) is None
    assert await adapters.list_adapters(db, other.id) == []
    messages = set()
    for attempt in (
        adapters.get_adapter(db, other.id, "bot"),
        adapters.list_versions(db, other.id, "bot"),
        adapters.delete_adapter(db, other.id, "bot"),
        adapters.get_adapter(db, acme.id, "made-up"),
        adapters.delete_adapter(db, acme.id, "made-up"),
    ):
        with pytest.raises(NotFound) as caught:
            await attempt
        messages.add(str(openai_body(caught.value)))
    assert len(messages) == 1
    with pytest.raises(NotFound):
        await adapters.activate(db, other.id, "bot", 1)
    assert (await adapters.get_adapter(db, acme.id, "bot")).live_version == 1


async def test_a_deleted_tenant_uploads_nothing(db: Database) -> None:
    base, acme = await base_model(db), await tenant(db, "acme")
    await upload(db, acme.id, "bot", base)
    results = await settled(tenants.delete_tenant(db, acme.id), *(upload(db, acme.id, f"bot{number}", base) for number in range(3)))
    assert results[0] is None
    assert set(results[1:]) <= {1, "tenant_not_found"}
    assert await adapters.list_adapters(db, acme.id) == []
    with pytest.raises(NotFound):
        await upload(db, acme.id, "bot", base)


# Base models and replicas.


async def test_a_base_model_keeps_its_id_and_the_operators_bounds(db: Database) -> None:
    first = await base_model(db)
    bounded = await change_base_model(db, "base", {"max_replicas": 5, "idle_timeout_s": 1.5})
    assert (bounded.max_replicas, bounded.idle_timeout_s, bounded.min_replicas) == (5, 1.5, None)
    again = await base_model(db, max_num_seqs=99, max_replicas=1)
    assert (again.id, again.max_num_seqs, again.max_replicas, again.idle_timeout_s) == (first.id, 99, 5, 1.5)
    assert await list_base_models(db) == [again]
    assert await get_base_model(db, first.id) == await get_base_model(db, "base") == again
    assert again.shapes.linears == {"model.layers.0.self_attn.q_proj": (64, 32)}
    for attempt in (get_base_model(db, "none"), change_base_model(db, "none", {"max_replicas": 1})):
        with pytest.raises(NotFound):
            await attempt


@pytest.mark.parametrize("state", list(Observed))
@pytest.mark.parametrize("target", list(Observed))
async def test_only_the_tables_transitions_are_made(db: Database, state: Observed, target: Observed) -> None:
    base = await base_model(db)
    await replicas.add_replica(db, "rep_1", base.id)
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE replicas SET observed = :state"), {"state": state.value})
    before = await replicas.get_replica(db, "rep_1")
    allowed = target in TRANSITIONS[state]
    assert await replicas.observe(db, "rep_1", target, url="http://e", reason="x" * 5000) is allowed
    row = await replicas.get_replica(db, "rep_1")
    assert row is not None
    if not allowed:
        assert row == before
    else:
        assert (row.observed, row.url, row.reason) == (target, "http://e", "x" * 2000)
        assert (row.ready_at is not None) == (target is Observed.READY)
        assert (row.ended_at is not None) == (target in TERMINAL)
    assert bool(await replicas.list_replicas(db, base_model_id=base.id)) == (row.observed not in TERMINAL)
    assert await replicas.desire_stop(db, "rep_1") == (row.observed not in TERMINAL)


async def test_of_two_that_end_a_replica_one_wins(db: Database) -> None:
    base = await base_model(db)
    await replicas.add_replica(db, "rep_1", base.id)
    results = await settled(*(replicas.observe(db, "rep_1", state) for state in (Observed.FAILED, Observed.LOST, Observed.STOPPED)))
    assert sorted(results) == [False, False, True]
    assert await replicas.observe(db, "rep_none", Observed.READY) is False
    row = await replicas.get_replica(db, "rep_1")
    assert row is not None
    assert row.desired == Desired.RUNNING
    assert await replicas.get_replica(db, "rep_none") is None
    assert await replicas.model_names(db) == {base.id: "base"}


async def test_recent_failures_count_only_failed_starts(db: Database) -> None:
    base, other = await base_model(db), await base_model(db, "other")
    assert await replicas.recent_failures(db, base.id, 600) == (0, 600)
    for name, model, states, ended_s in (
        ("failed", base, [Observed.FAILED], 30),
        ("lost", base, [Observed.LOST], 20),
        ("stopped", base, [Observed.STOPPED], 1),
        ("elsewhere", other, [Observed.FAILED], 1),
        ("long ago", base, [Observed.FAILED], 700),
    ):
        await replicas.add_replica(db, name, model.id)
        for state in states:
            await replicas.observe(db, name, state)
        async with db.begin(SYSTEM) as connection:
            await connection.execute(
                text("UPDATE replicas SET ended_at = now() - make_interval(secs => :s) WHERE id = :id"), {"s": ended_s, "id": name}
            )
    count, ago_s = await replicas.recent_failures(db, base.id, 600)
    assert count == 2
    assert 20 <= ago_s < 25


# Usage.


async def test_tenants_do_not_see_wasted_events(db: Database) -> None:
    acme = await tenant(db, "acme")
    wasted = {"status": UsageStatus.WASTED, "work": WorkClass.BACKGROUND}
    await usage.record_events(db, [usage_event("r1", acme.id), usage_event("w1", acme.id, **wasted)])
    shown = await usage.list_events(db, acme.id, Part(10), with_waste=False)
    assert [event.request_id for event in shown] == ["r1"]
    assert len(await usage.list_events(db, acme.id, Part(10))) == 2
    # Another page begins after an event that the tenant can see.
    with pytest.raises(InvalidRequest):
        await usage.list_events(db, acme.id, Part(10, "w1"), with_waste=False)


async def test_events_written_at_once_count_once(db: Database) -> None:
    acme = await tenant(db, "acme")
    events = [usage_event(f"r{number}", acme.id) for number in range(20)]
    await asyncio.gather(*(usage.record_events(db, sorted(events, key=lambda one: one.request_id)) for _ in range(4)))
    [row] = await usage_days.report(db, OPERATOR, [UsageDimension.DAY])
    assert row.requests == 20


# The connection.


async def test_lost_connections_are_replaced(db: Database) -> None:
    await tenant(db, "acme")
    kill = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
    with pytest.raises(Unavailable):  # noqa: PT012 (the block is what is tested)
        async with db.begin(SYSTEM) as held:
            async with db.begin(SYSTEM) as killer:
                await killer.execute(kill)
            await held.execute(text("SELECT 1"))
    assert [one.name for one in await tenants.list_tenants(db)] == ["acme"]
