"""The service of files on a real database and a folder, with the rights of each process."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmaas.admission.tiers import file_quota
from lmaas.files.service import Files, Purpose, Written
from lmaas.store.database import Database
from lmaas.store.files import File
from lmaas.store.objects import Objects
from lmaas.store.rights import DatabaseRole
from lmaas.store.scopes import SYSTEM
from lmaas.types import Quota
from tests.integration.store.build import tenant
from tests.support.databases import login_url


@dataclass
class World:
    """A tenant, and the service with the rights of each process."""

    db: Database
    tenant_id: str
    folder: Path
    objects: Objects
    gateway: Files
    jobs: Files
    controller: Files
    made: Callable[..., Files]

    async def upload(
        self, content: bytes, filename: str = "a.jsonl", expires_after_s: int | None = None, files: Files | None = None
    ) -> File:
        """Upload a file of the tenant."""
        files = files or self.gateway
        async with files.draft() as draft:
            await draft.write(content)
            return await files.upload(self.tenant_id, Written(Purpose.BATCH, filename, draft, expires_after_s))

    async def keys(self) -> list[str]:
        """Return the keys of all contents in the object store."""
        return sorted(await self.objects.list("files"))

    async def checks(self) -> int:
        """Return the number of checks of contents."""
        async with self.db.begin(SYSTEM) as connection:
            return int((await connection.exec_driver_sql("SELECT count(*) FROM content_checks")).scalar_one())

    async def make_due(self) -> None:
        """Make all checks of contents due, as an hour would."""
        async with self.db.begin(SYSTEM) as connection:
            await connection.exec_driver_sql("UPDATE content_checks SET due_at = now()")


@pytest.fixture
async def world(db: Database, database_url: str, tmp_path: Path) -> AsyncIterator[World]:
    objects = Objects((tmp_path / "store").as_uri())
    databases = {
        role: Database(login_url(database_url, role), role) for role in (DatabaseRole.GATEWAY, DatabaseRole.JOBS, DatabaseRole.CONTROLLER)
    }

    def made(role: DatabaseRole = DatabaseRole.GATEWAY, objects: Objects = objects, quota: Quota | None = None) -> Files:
        return Files(databases[role], objects, tmp_path / "uploads", 4_000_000, (lambda _: quota) if quota else file_quota)

    yield World(
        db,
        (await tenant(db, "acme")).id,
        tmp_path,
        objects,
        made(),
        made(DatabaseRole.JOBS),
        made(DatabaseRole.CONTROLLER),
        made,
    )
    for database in databases.values():
        await database.close()
