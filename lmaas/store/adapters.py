"""Adapters and their immutable versions. Every function reads and writes one tenant's adapters only."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, delete, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from lmaas.audit import Audit
from lmaas.errors import Conflict, NotFound, TooLarge
from lmaas.store.audit import record
from lmaas.store.database import Database, new_id
from lmaas.store.models import VALIDATED, BaseModel, lock_name
from lmaas.store.paging import Part, rows_of
from lmaas.store.tables import adapter_versions, adapters, base_models, tenants


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA weights for one base model, under a name that the tenant chose. `live_version` is None until one is activated."""

    id: str
    name: str
    base_model: str
    live_version: int | None
    latest_version: int
    created_at: datetime
    #: The role of the key that made the live version live; None if that is not known.
    activated_by: str | None


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable upload. `content_hash` is 64 hex digits, `size_bytes` counts the weights' file."""

    version: int
    content_hash: str
    rank: int
    target_modules: list[str]
    size_bytes: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Uploaded:
    """An adapter with the version that has an uploaded content, and whether that version is new."""

    adapter: Adapter
    version: AdapterVersion
    is_new: bool


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """The version of an adapter that a request runs on."""

    adapter_id: str
    version: int
    content_hash: str
    base_model_id: str
    #: When the version was uploaded.
    created_at: datetime


def _not_found() -> NotFound:
    return NotFound("The adapter does not exist.", code="adapter_not_found")


def _actor(audit: Audit | None) -> str | None:
    return None if audit is None else audit.actor


def _adapters(tenant_id: str) -> Select[Any]:
    latest = (
        select(func.coalesce(func.max(adapter_versions.c.version), 0))
        .where(adapter_versions.c.adapter_id == adapters.c.id, adapter_versions.c.tenant_id == tenant_id)
        .scalar_subquery()
    )
    columns = (adapters.c.id, adapters.c.name, base_models.c.name, adapters.c.live_version, latest)
    return (
        select(*columns, adapters.c.created_at, adapters.c.activated_by)
        .join(base_models, adapters.c.base_model_id == base_models.c.id)
        .where(adapters.c.tenant_id == tenant_id)
    )


async def list_adapters(db: Database, tenant_id: str, part: Part | None = None, search: str = "") -> list[Adapter]:
    """Return the tenant's adapters whose names contain `search`, or a part of them, by name. Raises InvalidRequest for a part after an
    unknown one."""
    async with db.begin(tenant_id) as connection:
        owned = adapters.c.tenant_id == tenant_id
        query = _adapters(tenant_id)
        if search:
            query = query.where(adapters.c.name.contains(search, autoescape=True))
        return [Adapter(*row) for row in await rows_of(connection, query, part, adapters.c.name, adapters.c.id, owned)]


async def get_adapter(db: Database, tenant_id: str, name: str) -> Adapter:
    """Return one adapter. Raises NotFound."""
    async with db.begin(tenant_id) as connection:
        row = (await connection.execute(_adapters(tenant_id).where(adapters.c.name == name))).one_or_none()
    if row is None:
        raise _not_found()
    return Adapter(*row)


def _versions(tenant_id: str, adapter_id: str) -> Select[Any]:
    columns = (adapter_versions.c[name] for name in AdapterVersion.__slots__)
    return select(*columns).where(adapter_versions.c.adapter_id == adapter_id, adapter_versions.c.tenant_id == tenant_id)


async def list_versions(
    db: Database, tenant_id: str, name: str, *, after: int | None = None, limit: int | None = None
) -> list[AdapterVersion]:
    """Return the versions of an adapter, or at most `limit` after the version `after`, oldest first. Raises NotFound."""
    adapter = await get_adapter(db, tenant_id, name)
    query = _versions(tenant_id, adapter.id).order_by(adapter_versions.c.version).limit(limit)
    if after is not None:
        query = query.where(adapter_versions.c.version > after)
    async with db.begin(tenant_id) as connection:
        return [AdapterVersion(*row) for row in await connection.execute(query)]


async def add_version(
    db: Database,
    tenant_id: str,
    name: str,
    base_model_id: str,
    *,
    content_hash: str,
    rank: int,
    target_modules: list[str],
    size_bytes: int,
    activate: bool,
    validated: BaseModel | None = None,
    audit: Audit | None = None,
) -> Uploaded:
    """Add a version (from 1) to the adapter, which is made if it is new.

    If a version of this adapter has the same content, nothing is added, and the latest such version is returned. `validated` is the base
    model as the content was validated against it.

    Raises TooLarge beyond the tenant's number of adapters, NotFound if the tenant or the base model has been deleted meanwhile, and
    Conflict if the adapter is for another base model, if a base model has its name, or if the base model is no longer as in `validated`.
    """
    async with db.begin(tenant_id) as connection:
        # The tenant's row orders uploads, so that neither the quota nor a version number is given out twice.
        tenant = (
            await connection.execute(
                select(tenants.c.max_adapters).where(tenants.c.id == tenant_id, tenants.c.deleted_at.is_(None)).with_for_update()
            )
        ).one_or_none()
        if tenant is None:
            raise NotFound("The tenant does not exist.", code="tenant_not_found")
        await lock_name(connection, name, shared=True)
        alive = base_models.c.deleted_at.is_(None)
        if (await connection.execute(select(base_models.c.id).where(base_models.c.name == name, alive))).first() is not None:
            raise name_taken(name)
        # A deletion or change of the base model waits for this transaction, or this one for it.
        facts = sorted(VALIDATED)
        there = select(*(base_models.c[fact] for fact in facts)).where(base_models.c.id == base_model_id, alive)
        base = (await connection.execute(there.with_for_update(key_share=True, read=True))).one_or_none()
        if base is None:
            raise NotFound("The base model does not exist.", code="base_model_not_found", param="base_model")
        if validated is not None and tuple(base) != tuple(getattr(validated, fact) for fact in facts):
            raise Conflict(
                "The base model was changed while the adapter was validated. Upload the adapter again.",
                code="base_model_changed",
                param="base_model",
            )
        values = {"id": new_id("ada"), "tenant_id": tenant_id, "name": name, "base_model_id": base_model_id}
        await connection.execute(upsert(adapters).values(values).on_conflict_do_nothing())
        row = (
            await connection.execute(
                # Locked, because activations do not lock the tenant's row.
                select(adapters.c.id, adapters.c.base_model_id, adapters.c.live_version)
                .where(adapters.c.tenant_id == tenant_id, adapters.c.name == name)
                .with_for_update()
            )
        ).one()
        if row.base_model_id != base_model_id:
            raise Conflict(
                f"The adapter '{name}' belongs to another base model. Choose another name.", code="base_model_conflict", param="base_model"
            )
        count = (await connection.execute(select(func.count()).select_from(adapters).where(adapters.c.tenant_id == tenant_id))).scalar_one()
        if count > tenant.max_adapters:
            raise TooLarge(
                f"This tenant has {tenant.max_adapters} adapters, the maximum. Delete one, or raise max_adapters.", code="too_many_adapters"
            )
        columns = adapter_versions.c
        latest = select(func.max(columns.version)).where(columns.adapter_id == row.id, columns.tenant_id == tenant_id)
        version = (await connection.execute(latest.where(columns.content_hash == content_hash))).scalar_one()
        is_new = version is None
        if is_new:
            version = ((await connection.execute(latest)).scalar_one() or 0) + 1
            await connection.execute(
                insert(adapter_versions).values(
                    adapter_id=row.id,
                    tenant_id=tenant_id,
                    version=version,
                    content_hash=content_hash,
                    rank=rank,
                    target_modules=target_modules,
                    size_bytes=size_bytes,
                )
            )
        goes_live = activate and row.live_version != version
        if goes_live:
            await connection.execute(
                update(adapters)
                .where(adapters.c.id == row.id, adapters.c.tenant_id == tenant_id)
                .values(live_version=version, activated_by=_actor(audit))
            )
        if is_new or goes_live:
            await record(connection, audit, tenant_id, f"{name}@{version}")
        adapter = (await connection.execute(_adapters(tenant_id).where(adapters.c.id == row.id))).one()
        mine = (await connection.execute(_versions(tenant_id, row.id).where(columns.version == version))).one()
    return Uploaded(Adapter(*adapter), AdapterVersion(*mine), is_new)


async def activate(db: Database, tenant_id: str, name: str, version: int, *, audit: Audit | None = None) -> Adapter:
    """Make `version` the live one, and return the adapter; an older version is a rollback. Raises NotFound."""
    columns = adapter_versions.c
    exists = select(columns.version).where(
        columns.adapter_id == adapters.c.id, columns.tenant_id == adapters.c.tenant_id, columns.version == version
    )
    query = (
        select(adapters.c.id, adapters.c.live_version)
        .where(adapters.c.tenant_id == tenant_id, adapters.c.name == name, exists.exists())
        .with_for_update()
    )
    async with db.begin(tenant_id) as connection:
        row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise NotFound("The adapter or this version does not exist.", code="adapter_not_found")
        if row.live_version != version:
            values = {"live_version": version, "activated_by": _actor(audit)}
            await connection.execute(update(adapters).where(adapters.c.id == row.id).values(values))
            await record(connection, audit, tenant_id, f"{name}@{version}")
        return Adapter(*(await connection.execute(_adapters(tenant_id).where(adapters.c.id == row.id))).one())


async def delete_adapter(db: Database, tenant_id: str, name: str, *, audit: Audit | None = None) -> list[str]:
    """Delete an adapter with its versions; return their content hashes. Raises NotFound."""
    async with db.begin(tenant_id) as connection:
        await connection.execute(select(tenants.c.id).where(tenants.c.id == tenant_id).with_for_update())
        found = select(adapter_versions.c.content_hash).join(adapters).where(adapters.c.tenant_id == tenant_id, adapters.c.name == name)
        hashes = set((await connection.execute(found)).scalars())
        gone = await connection.execute(
            delete(adapters).where(adapters.c.tenant_id == tenant_id, adapters.c.name == name).returning(adapters.c.id)
        )
        if gone.first() is None:
            raise _not_found()
        await record(connection, audit, tenant_id, name)
    return sorted(hashes)


def name_taken(name: str) -> Conflict:
    """Return the error for an adapter with the name of a base model."""
    return Conflict(f"'{name}' is the name of a base model. Choose another name.", code="name_taken", param="name")


@asynccontextmanager
async def unused(db: Database, tenant_id: str, hashes: Iterable[str]) -> AsyncIterator[list[str]]:
    """Provide those of `hashes` that no version of this tenant has. No upload can begin to use one during the block, which deletes their
    files."""
    async with db.begin(tenant_id) as connection:
        await connection.execute(select(tenants.c.id).where(tenants.c.id == tenant_id).with_for_update())
        yield sorted(set(hashes) - await _used(connection, tenant_id))


async def _used(connection: Any, tenant_id: str) -> set[str]:
    rest = select(adapter_versions.c.content_hash).join(adapters).where(adapters.c.tenant_id == tenant_id)
    return set((await connection.execute(rest)).scalars())


async def find_served(db: Database, tenant_id: str, name: str, version: int | None) -> ServedAdapter | None:
    """Return the pinned version, or the live one; None if this tenant has no such adapter or version."""
    wanted = adapters.c.live_version if version is None else version
    query = (
        select(
            adapters.c.id,
            adapter_versions.c.version,
            adapter_versions.c.content_hash,
            adapters.c.base_model_id,
            adapter_versions.c.created_at,
        )
        .join(adapter_versions)
        .where(adapters.c.tenant_id == tenant_id, adapters.c.name == name, adapter_versions.c.version == wanted)
    )
    async with db.begin(tenant_id) as connection:
        row = (await connection.execute(query)).one_or_none()
    return None if row is None else ServedAdapter(*row)
