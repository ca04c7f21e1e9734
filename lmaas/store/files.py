"""Rows of files, and the checks that keep the object store free of contents that no file has.

Files of a tenant with the same SHA-256 share one content in the object store. A content may be there without a file: while it is stored for
a new file, and while it is deleted after its last one. For that time, it has a row in `content_checks`. Its writer removes it
when the content has a file or is deleted, and controllers check what a process that died has left, when it is due.

A content is deleted, and a file is added, only under the lock of the content. So a file never loses its bytes to a deletion that began
before it was added.
"""

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, bindparam, delete, func, insert, or_, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import Text

from lmaas.audit import Audit
from lmaas.errors import NotFound, TooLarge
from lmaas.store.audit import record
from lmaas.store.database import Database
from lmaas.store.paging import Part, rows_of
from lmaas.store.scopes import OPERATOR, SYSTEM, AnyScope
from lmaas.store.tables import content_checks, files, tenants
from lmaas.types import Quota

#: When the content of a new file is checked, unless the file has been added by then. An upload to the object store takes less.
STORING = timedelta(hours=1)
#: When a content that could not be deleted is tried again.
POSTPONED = timedelta(minutes=10)
#: Rows that one statement deletes, and contents that are checked at once.
ROWS_AT_ONCE = 500
CHECKS_AT_ONCE = 50


@dataclass(frozen=True, slots=True)
class File:
    """A file of a tenant. `sha256` is that of its content, in hex; `expires_at` is None if it is kept until it is deleted."""

    tenant_id: str
    id: str
    purpose: str
    filename: str
    size_bytes: int
    sha256: str
    created_at: datetime
    expires_at: datetime | None

    @property
    def key(self) -> str:
        """The key of its content in the object store."""
        return key_of(self.tenant_id, self.sha256)


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file to add. Without `expires_after_s` it is kept until it is deleted."""

    purpose: str
    filename: str
    size_bytes: int
    sha256: str
    expires_after_s: int | None


@dataclass(frozen=True, slots=True)
class Check:
    """A content that is deleted unless a file has it."""

    tenant_id: str
    id: str
    sha256: str

    @property
    def content(self) -> tuple[str, str]:
        """The tenant and the hash of the content."""
        return self.tenant_id, self.sha256


#: Work in the transaction that adds files.
Within = Callable[[AsyncConnection, Sequence[File]], Awaitable[None]]

_FILE = tuple(files.c[name] for name in File.__slots__)
_CHECK = tuple(content_checks.c[name] for name in Check.__slots__)
_LIVE = or_(files.c.expires_at.is_(None), files.c.expires_at > func.now())


def key_of(tenant_id: str, sha256: str) -> str:
    """Return the key of a tenant's content in the object store."""
    return f"files/{tenant_id}/{sha256}"


def not_found() -> NotFound:
    """Return the error for a file that does not exist, or belongs to another tenant."""
    return NotFound("The file does not exist: it has expired, was deleted, or never existed.", code="file_not_found", param="file_id")


async def find_file(db: Database, tenant_id: str, file_id: str) -> File | None:
    """Return a file of this tenant, or None. A file that has expired does not exist."""
    query = select(*_FILE).where(files.c.tenant_id == tenant_id, files.c.id == file_id, _LIVE)
    async with db.begin(tenant_id) as connection:
        row = (await connection.execute(query)).one_or_none()
    return None if row is None else File(*row)


async def list_files(db: Database, tenant_id: str, part: Part, *, purpose: str | None = None, newest_first: bool = True) -> list[File]:
    """Return a part of the tenant's files in the order of their creation. Raises InvalidRequest for a part after an unknown file."""
    owned = (files.c.tenant_id == tenant_id, _LIVE)
    query = select(*_FILE).where(*owned)
    if purpose is not None:
        query = query.where(files.c.purpose == purpose)
    async with db.begin(tenant_id) as connection:
        rows = await rows_of(connection, query, part, files.c.created_at, files.c.id, *owned, newest_first=newest_first)
    return [File(*row) for row in rows]


async def check_room(db: Database, tenant_id: str, quota: Quota, size_bytes: int) -> None:
    """Raise TooLarge if a file of this size would exceed the tenant's quota as things are now."""
    async with db.begin(tenant_id) as connection:
        await _check_quota(connection, tenant_id, quota, 1, size_bytes)


async def _check_quota(connection: AsyncConnection, tenant_id: str, quota: Quota, more: int, more_bytes: int) -> None:
    stored = select(func.count(), func.coalesce(func.sum(files.c.size_bytes), 0)).where(files.c.tenant_id == tenant_id, _LIVE)
    count, size_bytes = (await connection.execute(stored)).one()
    what = "Delete files, or ask the operator for a higher tier."
    if count + more > quota.files:
        raise TooLarge(f"This tenant has {count:,} files, and {quota.of} allows {quota.files:,}. {what}", code="file_quota_exceeded")
    if size_bytes + more_bytes > quota.size_bytes:
        raise TooLarge(
            f"This tenant has files of {size_bytes:,} bytes in all, and {quota.of} allows {quota.size_bytes:,}, so there is no room for "
            f"{more_bytes:,} more. {what}",
            code="file_quota_exceeded",
        )


async def tier_of(db: Database, tenant_id: str) -> str:
    """Return the tier of a tenant. Raises NotFound for one that is deleted."""
    async with db.begin(tenant_id) as connection:
        return await _tier(connection, tenant_id)


async def _tier(connection: AsyncConnection, tenant_id: str, *, lock: bool = False) -> str:
    query = select(tenants.c.tier).where(tenants.c.id == tenant_id, tenants.c.deleted_at.is_(None))
    # The lock orders additions, so that no quota is given out twice, and a deletion of the tenant waits. It does not hold up other rows
    # that refer to the tenant.
    tier: str | None = (await connection.execute(query.with_for_update(key_share=True) if lock else query)).scalar_one_or_none()
    if tier is None:
        raise NotFound("The tenant does not exist.", code="tenant_not_found")
    return tier


async def expect_contents(db: Database, tenant_id: str, hashes: Collection[str]) -> list[Check]:
    """Write the checks of contents that are about to be stored. Raises NotFound for a tenant that is deleted."""
    async with db.begin(tenant_id) as connection:
        await _tier(connection, tenant_id)
        return await _add_checks(connection, [(tenant_id, sha256) for sha256 in hashes], STORING)


async def _add_checks(connection: AsyncConnection, contents: Iterable[tuple[str, str]], after: timedelta) -> list[Check]:
    checks = [Check(tenant_id, secrets.token_hex(12), sha256) for tenant_id, sha256 in sorted(set(contents))]
    if checks:
        rows = [{"id": check.id, "tenant_id": check.tenant_id, "sha256": check.sha256} for check in checks]
        await connection.execute(insert(content_checks).values(due_at=func.now() + after), rows)
    return checks


@asynccontextmanager
async def adding(db: Database, checks: Sequence[Check]) -> AsyncIterator[AsyncConnection]:
    """Provide a transaction that holds the locks of the contents of these checks, which have one tenant."""
    async with db.begin(checks[0].tenant_id) as connection:
        await _lock_contents(connection, [check.content for check in checks])
        yield connection


async def add_files(
    connection: AsyncConnection,
    checks: Sequence[Check],
    added: Sequence[NewFile],
    quota: Quota | None = None,
    audit: Audit | None = None,
) -> list[File]:
    """Add files whose contents are in the object store, in a transaction of `adding`, and remove their checks.

    With a `quota`, raises TooLarge if it would be exceeded. Raises NotFound for a tenant that is deleted.
    """
    tenant_id = checks[0].tenant_id
    await _tier(connection, tenant_id, lock=True)
    if quota is not None:
        await _check_quota(connection, tenant_id, quota, len(added), sum(new.size_bytes for new in added))
    found = []
    for new in added:
        values = {
            "tenant_id": tenant_id,
            "id": f"file-{secrets.token_hex(12)}",
            "purpose": new.purpose,
            "filename": new.filename,
            "size_bytes": new.size_bytes,
            "sha256": new.sha256,
            "expires_at": None if new.expires_after_s is None else func.now() + timedelta(seconds=new.expires_after_s),
        }
        file = File(*(await connection.execute(insert(files).values(values).returning(*_FILE))).one())
        await record(connection, audit, tenant_id, file.id)
        found.append(file)
    await _remove_checks(connection, checks)
    return found


async def delete_file(db: Database, tenant_id: str, file_id: str, *, audit: Audit | None = None) -> list[Check]:
    """Delete a file of this tenant, and return the check of its content. Raises NotFound."""
    query = delete(files).where(files.c.tenant_id == tenant_id, files.c.id == file_id, _LIVE).returning(files.c.sha256)
    async with db.begin(tenant_id) as connection:
        sha256 = (await connection.execute(query)).scalar_one_or_none()
        if sha256 is None:
            raise not_found()
        await record(connection, audit, tenant_id, file_id)
        return await _add_checks(connection, [(tenant_id, sha256)], timedelta())


async def expire_files(connection: AsyncConnection, tenant_id: str) -> None:
    """Let all files of a tenant expire now, with its deletion."""
    await connection.execute(update(files).where(files.c.tenant_id == tenant_id).values(expires_at=func.now()))


async def delete_expired(db: Database, tenant_id: str | None = None) -> int:
    """Delete some expired files and write the checks of their contents: for an operator those of a tenant, otherwise for a controller those
    of all tenants. Returns the number of files."""
    condition = files.c.expires_at <= func.now()
    if tenant_id is not None:
        condition &= files.c.tenant_id == tenant_id
    first = select(files.c.tenant_id, files.c.id).where(condition).order_by(files.c.expires_at).limit(ROWS_AT_ONCE)
    gone = delete(files).where(tuple_(files.c.tenant_id, files.c.id).in_(first)).returning(files.c.tenant_id, files.c.sha256)
    async with db.begin(SYSTEM if tenant_id is None else OPERATOR) as connection:
        rows = (await connection.execute(gone)).all()
        await _add_checks(connection, [(row.tenant_id, row.sha256) for row in rows], timedelta())
    return len(rows)


async def due_checks(db: Database, tenant_id: str | None = None) -> list[Check]:
    """Return some checks that are due, the earliest first: for an operator those of a tenant, otherwise for a controller those of all
    tenants."""
    query = select(*_CHECK).where(content_checks.c.due_at <= func.now()).order_by(content_checks.c.due_at).limit(CHECKS_AT_ONCE)
    if tenant_id is not None:
        query = query.where(content_checks.c.tenant_id == tenant_id)
    async with db.begin(SYSTEM if tenant_id is None else OPERATOR) as connection:
        return [Check(*row) for row in await connection.execute(query)]


async def postpone(db: Database, checks: Sequence[Check]) -> None:
    """Let checks be due later, for a controller, so that those which fail do not hold up others."""
    query = update(content_checks).where(_are(checks))
    async with db.begin(SYSTEM) as connection:
        await connection.execute(query.values(due_at=func.now() + POSTPONED))


@asynccontextmanager
async def unused(db: Database, scope: AnyScope, checks: Sequence[Check]) -> AsyncIterator[list[str]]:
    """Provide the keys of those contents of `checks` that no file has. No file can be added with one during the block, which deletes them;
    after it, the checks are removed."""
    contents = {check.content for check in checks}
    async with db.begin(scope) as connection:
        await _lock_contents(connection, contents)
        used = select(files.c.tenant_id, files.c.sha256).where(tuple_(files.c.tenant_id, files.c.sha256).in_(sorted(contents)))
        found = {(row.tenant_id, row.sha256) for row in await connection.execute(used)}
        yield [key_of(*content) for content in sorted(contents - found)]
        await _remove_checks(connection, checks)


async def stored_files(db: Database) -> tuple[int, int]:
    """Return the number of all files and their bytes, for a controller. It reads every row."""
    query = select(func.count(files.c.id), func.coalesce(func.sum(files.c.size_bytes), 0))
    async with db.begin(SYSTEM) as connection:
        count, size_bytes = (await connection.execute(query)).one()
    return int(count), int(size_bytes)


async def _remove_checks(connection: AsyncConnection, checks: Sequence[Check]) -> None:
    await connection.execute(delete(content_checks).where(_are(checks)))


def _are(checks: Sequence[Check]) -> ColumnElement[bool]:
    return tuple_(content_checks.c.tenant_id, content_checks.c.id).in_([(check.tenant_id, check.id) for check in checks])


#: In the order of the keys, so that two transactions with several contents do not wait for each other.
_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended(key, 0)) FROM unnest(:keys) AS key").bindparams(
    bindparam("keys", type_=ARRAY(Text()))
)


async def _lock_contents(connection: AsyncConnection, contents: Iterable[tuple[str, str]]) -> None:
    await connection.execute(_LOCK, {"keys": sorted({key_of(*content) for content in contents})})
