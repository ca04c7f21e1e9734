"""Simultaneous uploads and deletions, and deletions that fail: no files without a version are left, and no version without its files."""

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import pytest

from lmaas.adapters.objects import AdapterFiles
from lmaas.adapters.service import Adapters
from lmaas.errors import Conflict, InvalidRequest, NotFound, Unavailable
from lmaas.states import PoolKind
from lmaas.store import adapters as rows
from lmaas.store import models, tenants
from lmaas.store.adapters import Uploaded
from lmaas.store.database import Database
from lmaas.store.objects import Objects
from tests.integration.store.build import base_model, tenant
from tests.support.adapters import base as shapes
from tests.support.adapters import config, pack, tensors

Step = Callable[[], Awaitable[object]]


class Files(AdapterFiles):
    """A store that runs a step before one of its calls of `put`, or refuses to delete."""

    def __init__(self, url: str) -> None:
        super().__init__(Objects(url))
        self.before: dict[int, Step] = {}
        self.puts = 0
        self.refuses = False

    async def put(self, source: str, config: bytes, model: Path) -> None:
        self.puts += 1
        if self.puts in self.before:
            await self.before[self.puts]()
        await super().put(source, config, model)

    async def delete(self, sources: Iterable[str]) -> None:
        if self.refuses:
            raise Unavailable("The adapter store did not delete the files.", code="object_store_unavailable")
        await super().delete(sources)


class World:
    """A tenant with a base model, and the service."""

    def __init__(self, db: Database, folder: Path, tenant_id: str) -> None:
        self.files = Files((folder / "store").as_uri())
        self.adapters = Adapters(db, self.files)
        self.tenant_id, self._folder = tenant_id, folder

    async def upload(self, name: str = "bot", dtype: str = "F32") -> Uploaded:
        model = self._folder / "adapter_model.safetensors"
        model.write_bytes(pack(tensors(dtype=dtype)))
        return await self.adapters.upload(self.tenant_id, name, "base", config(), model, activate=True)

    async def delete(self, name: str = "bot") -> None:
        await self.adapters.delete(self.tenant_id, name)

    async def sources(self) -> list[str]:
        return await self.files.list_sources(self.tenant_id)


@pytest.fixture
async def world(db: Database, gateway_db: Database, tmp_path: Path) -> World:
    await base_model(db, linears={name: list(shape) for name, shape in shapes().linears.items()})
    return World(gateway_db, tmp_path, (await tenant(db, "acme")).id)


async def test_an_adapter_that_is_deleted_during_its_upload_leaves_no_files(world: World) -> None:
    world.files.before[2] = world.delete
    uploaded = await world.upload()
    assert (uploaded.adapter.name, uploaded.version.version, uploaded.is_new) == ("bot", 1, True)
    assert await world.sources() == []


async def test_a_tenant_that_is_deleted_during_an_upload_leaves_no_files(world: World, gateway_db: Database) -> None:
    async def delete() -> None:
        await tenants.delete_tenant(gateway_db, world.tenant_id)
        await world.adapters.delete_all(world.tenant_id)

    world.files.before[1] = delete
    with pytest.raises(NotFound):
        await world.upload()
    assert await world.sources() == []


async def test_a_tenant_that_is_deleted_after_the_version_was_added_leaves_no_files(world: World, gateway_db: Database) -> None:
    async def delete() -> None:
        await tenants.delete_tenant(gateway_db, world.tenant_id)
        await world.adapters.delete_all(world.tenant_id)

    world.files.before[2] = delete
    assert (await world.upload()).is_new
    assert await world.sources() == []


async def test_a_content_that_its_other_adapter_loses_during_an_upload_is_stored(world: World) -> None:
    await world.upload("twin")
    world.files.before[4] = lambda: world.delete("twin")
    await world.upload("bot")
    assert len(await world.sources()) == 1


async def test_an_upload_that_cannot_be_stored_the_second_time_is_repeated(world: World) -> None:
    async def fail() -> None:
        raise Unavailable("The adapter store did not accept the files.", code="object_store_unavailable")

    world.files.before[2] = fail
    with pytest.raises(Unavailable):
        await world.upload()
    # The version is there: the same upload stores its files.
    assert not (await world.upload()).is_new
    assert len(await world.sources()) == 1


async def test_a_deletion_whose_files_stayed_is_repeated(world: World, gateway_db: Database) -> None:
    await world.upload("bot")
    await world.upload("other", dtype="F16")
    world.files.refuses = True
    for _ in range(2):
        with pytest.raises(Unavailable):
            await world.delete()
        assert [adapter.name for adapter in await rows.list_adapters(gateway_db, world.tenant_id)] == ["other"]
        assert len(await world.sources()) == 2
    world.files.refuses = False
    await world.delete()
    [left] = await world.sources()
    [version] = await rows.list_versions(gateway_db, world.tenant_id, "other")
    assert left.endswith(version.content_hash)
    with pytest.raises(NotFound):
        await world.delete()


async def test_a_base_model_that_changes_while_an_adapter_is_validated(world: World, gateway_db: Database) -> None:
    async def change() -> None:
        await models.change_base_model(gateway_db, "base", {"max_lora_rank": 8})

    world.files.before[1] = change
    with pytest.raises(Conflict, match="changed while the adapter was validated"):
        await world.upload()
    assert await world.sources() == []


async def test_a_base_model_that_would_ignore_an_adapter_takes_none(db: Database, tmp_path: Path) -> None:
    world = World(db, tmp_path, (await tenant(db, "acme")).id)
    await base_model(db, "base", linears={}, kind=PoolKind.EMBED)
    with pytest.raises(InvalidRequest, match="'base' takes no adapters") as raised:
        await world.upload()
    assert (raised.value.error_code, raised.value.param) == ("base_model_takes_no_adapters", "base_model")
    assert await world.sources() == []
