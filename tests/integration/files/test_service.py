"""The service of files: shared contents, ranges, quotas, expiry, and races, which neither lose bytes nor leave any behind."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.audit import Action, Audit
from lmaas.errors import NotFound, TooLarge, Unavailable
from lmaas.files.service import SETTLING_AT_ONCE, Purpose, Written
from lmaas.store import files as rows
from lmaas.store import tenants
from lmaas.store.files import File
from lmaas.store.objects import Objects
from lmaas.store.paging import Part
from lmaas.store.rights import DatabaseRole
from lmaas.store.scopes import SYSTEM
from lmaas.types import Quota
from tests.integration.files.conftest import World
from tests.integration.store.build import tenant
from tests.support.buckets import bucket
from tests.support.conditions import until

Step = Callable[[], Awaitable[object]]


class SteppedObjects(Objects):
    """A store that runs a step before or after one of its calls, or refuses to delete."""

    def __init__(self, folder: Path) -> None:
        super().__init__((folder / "store").as_uri())
        #: Steps by the name of a call and its number, from 1.
        self.steps: dict[tuple[str, int], Step] = {}
        self.calls: dict[str, int] = {}
        self.refuses = False

    async def _step(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        if (step := self.steps.get((name, self.calls[name]))) is not None:
            await step()

    async def exists(self, key: str) -> bool:
        await self._step("exists")
        found = await super().exists(key)
        if found:
            await self._step("seen")
        return found

    async def put(self, key: str, content: bytes | Path) -> None:
        await self._step("put")
        await super().put(key, content)
        await self._step("stored")

    async def delete(self, keys: Iterable[str]) -> None:
        await self._step("delete")
        if self.refuses:
            raise Unavailable("The object store did not delete the files.", code="object_store_unavailable")
        await super().delete(keys)


async def pieces(*several: bytes) -> AsyncIterator[bytes]:
    for piece in several:
        yield piece


async def content_of(world: World, file: File) -> bytes:
    return b"".join([piece async for piece in world.gateway.stream(file)])


async def test_a_file_is_stored_by_its_hash_and_read_back(world: World) -> None:
    content = os.urandom(3_500_000)
    file = await world.upload(content, "übung\u202e 1.jsonl", 3600)
    assert (file.filename, file.size_bytes, file.sha256) == ("übung\u202e 1.jsonl", len(content), hashlib.sha256(content).hexdigest())
    assert file.expires_at is not None
    assert (file.expires_at - file.created_at).total_seconds() == 3600
    assert await world.keys() == [f"files/{world.tenant_id}/{file.sha256}"]
    assert await world.gateway.get(world.tenant_id, file.id) == await world.jobs.get(world.tenant_id, file.id) == file
    assert await content_of(world, file) == content
    ranges = [(0, 5), (7, 0), (3_499_999, 1), (1_000_000, 1_500_000)]
    assert await world.jobs.read(file, ranges) == [content[offset : offset + length] for offset, length in ranges]
    assert await world.jobs.read(file, [(0, 0)]) == [b""]
    assert await world.jobs.read(file, []) == []
    assert await world.checks() == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
async def test_files_in_a_bucket(world: World) -> None:
    with bucket() as url:
        objects = Objects(url)
        files = world.made(objects=objects)
        content = b"{}\n" * 1_100_000
        first, second = await world.upload(content[:3_300_000], files=files), await world.upload(content[:3_300_000], files=files)
        assert await objects.list("files") == [first.key]
        assert b"".join([piece async for piece in files.stream(first)]) == content
        assert await files.read(first, [(0, 2), (3_299_998, 2)]) == [b"{}", b"}\n"]
        for file in (first, second):
            await files.delete(world.tenant_id, file.id)
        assert (await objects.list("files"), await world.checks()) == ([], 0)
        for number in range(3):
            await world.upload(bytes([number]), files=files)
        assert len(await objects.list("files")) == 3
        async with world.db.begin(SYSTEM) as connection:
            await connection.exec_driver_sql("UPDATE files SET expires_at = now()")
        controller = world.made(DatabaseRole.CONTROLLER, objects)
        while await controller.sweep():
            pass
        assert (await objects.list("files"), await world.checks()) == ([], 0)


async def test_an_empty_file(world: World) -> None:
    file = await world.upload(b"")
    assert (file.size_bytes, await content_of(world, file)) == (0, b"")
    await world.gateway.delete(world.tenant_id, file.id)
    assert await world.keys() == []


async def test_files_share_bytes_until_the_last_is_deleted(world: World) -> None:
    first, second = await world.upload(b"same", "a"), await world.upload(b"same", "b")
    other = (await tenant(world.db, "globex")).id
    theirs = await world.jobs.add(other, Purpose.BATCH_OUTPUT, "c", pieces(b"sa", b"me"))
    assert len({first.id, second.id, theirs.id}) == 3
    assert len(await world.keys()) == 2
    await world.gateway.delete(world.tenant_id, first.id)
    assert await content_of(world, second) == b"same"
    with pytest.raises(NotFound):
        await world.gateway.delete(world.tenant_id, first.id)
    await world.gateway.delete(world.tenant_id, second.id)
    assert await world.keys() == [theirs.key]
    with pytest.raises(NotFound):
        await content_of(world, second)
    with pytest.raises(NotFound):
        await world.gateway.read(second, [(0, 1)])
    assert await world.checks() == 0


@pytest.mark.parametrize("file_id", ["file-0", "file-" + "0" * 24, "batch_1", "file-" + "0" * 10**6, "file-\0", "../file", ""])
async def test_an_id_that_no_file_has(world: World, file_id: str) -> None:
    for call in (world.gateway.get(world.tenant_id, file_id), world.gateway.delete(world.tenant_id, file_id)):
        with pytest.raises(NotFound) as raised:
            await call
        assert raised.value.error_code == "file_not_found"


async def test_other_tenants_files_do_not_exist(world: World) -> None:
    file = await world.upload(b"mine")
    other = (await tenant(world.db, "globex")).id
    for call in (world.gateway.get(other, file.id), world.gateway.delete(other, file.id), world.jobs.get(other, file.id)):
        with pytest.raises(NotFound):
            await call
    assert await content_of(world, file) == b"mine"


async def test_one_byte_too_many_leaves_nothing(world: World) -> None:
    async with world.gateway.draft() as draft:
        await draft.write(b"x" * 3_999_999)
        await draft.write(b"y")
        with pytest.raises(TooLarge, match="more than 4,000,000 bytes") as raised:
            await draft.write(b"z")
    assert (raised.value.error_code, raised.value.param) == ("file_too_large", "file")
    assert (await world.keys(), await world.checks(), os.listdir(world.folder / "uploads")) == ([], 0, [])


async def test_a_draft_has_no_name(world: World) -> None:
    async with world.gateway.draft() as draft:
        await draft.write(b"x" * 2_000_000)
        await draft.finish()
        assert os.listdir(world.folder / "uploads") == []
        assert await asyncio.to_thread(draft.path.read_bytes) == b"x" * 2_000_000


@pytest.mark.parametrize(
    ("quota", "words"),
    [
        (Quota(2, 100, "its tier 'free'"), "has 2 files, and its tier 'free' allows 2"),
        (Quota(9, 10, "its tier 'free'"), "files of 8 bytes in all, and its tier 'free' allows 10, so there is no room for 4 more"),
    ],
)
async def test_a_quota_is_for_what_a_tenant_uploads(world: World, quota: Quota, words: str) -> None:
    files = world.made(quota=quota)
    first = await world.upload(b"1234", files=files)
    await world.upload(b"5678", files=files)
    for refused in (lambda: world.upload(b"9012", files=files), lambda: files.check_room(world.tenant_id, 4)):
        with pytest.raises(TooLarge, match=words) as raised:
            await refused()
        assert raised.value.error_code == "file_quota_exceeded"
    assert (len(await world.keys()), await world.checks()) == (2, 0)
    # Files of the service itself are never refused, but count.
    await world.jobs.add(world.tenant_id, Purpose.BATCH_OUTPUT, "out.jsonl", pieces(b"9012"))
    await files.delete(world.tenant_id, first.id)
    with pytest.raises(TooLarge):
        await files.check_room(world.tenant_id, 4)


async def test_a_quota_is_not_given_out_twice(world: World) -> None:
    files = world.made(quota=Quota(3, 10**6, "its tier"))
    done = await asyncio.gather(*(world.upload(os.urandom(9), files=files) for _ in range(8)), return_exceptions=True)
    assert len([each for each in done if isinstance(each, File)]) == 3
    assert len([each for each in done if isinstance(each, TooLarge)]) == 5
    assert (len(await world.keys()), await world.checks()) == (3, 0)


async def test_lists_are_in_the_order_of_creation(world: World) -> None:
    found = [await world.upload(str(number).encode(), str(number)) for number in range(4)]
    output = await world.jobs.add(world.tenant_id, Purpose.BATCH_OUTPUT, "out", pieces(b"out"))

    async def listed(part: Part, **more: Any) -> list[str]:
        return [file.filename for file in await rows.list_files(world.db, world.tenant_id, part, **more)]

    assert await listed(Part(10)) == ["out", "3", "2", "1", "0"]
    assert await listed(Part(1), newest_first=False) == ["0", "1"]
    assert await listed(Part(10, found[2].id)) == ["1", "0"]
    assert await listed(Part(10, found[2].id), newest_first=False) == ["3", "out"]
    assert await listed(Part(10), purpose="batch_output") == [output.filename]


# Races.


async def test_a_content_that_its_other_file_loses_during_an_upload_is_stored_again(world: World) -> None:
    objects = SteppedObjects(world.folder)
    twin = await world.upload(b"same")
    # The content exists when the upload looks, and is deleted before the upload has the lock.
    objects.steps["seen", 1] = lambda: world.gateway.delete(world.tenant_id, twin.id)
    file = await world.upload(b"same", files=world.made(objects=objects))
    assert (objects.calls["stored"], await content_of(world, file), await world.checks()) == (1, b"same", 0)


async def test_a_deletion_under_way_does_not_take_the_bytes_of_a_new_file(world: World) -> None:
    objects = SteppedObjects(world.folder)
    twin, uploads = await world.upload(b"same"), []

    async def begin_upload() -> None:
        # The deletion holds the lock, and has deleted nothing yet. The upload finds the content, and waits for the lock.
        found = objects.calls.get("seen", 0)
        uploads.append(asyncio.create_task(world.upload(b"same", files=world.made(objects=objects))))
        await until(lambda: objects.calls.get("seen", 0) > found)

    objects.steps["delete", 1] = begin_upload
    await world.made(objects=objects).delete(world.tenant_id, twin.id)
    file = await uploads[0]
    assert (await content_of(world, file), await world.keys(), await world.checks()) == (b"same", [file.key], 0)


async def test_uploads_and_deletions_of_one_content_at_once(world: World) -> None:
    async def once() -> File | None:
        file = await world.upload(b"same")
        assert await content_of(world, file) == b"same"
        if os.urandom(1)[0] % 2:
            return file
        await world.gateway.delete(world.tenant_id, file.id)
        return None

    kept = [file for file in await asyncio.gather(*(once() for _ in range(24))) if file is not None]
    for file in kept:
        assert await content_of(world, file) == b"same"
    assert len(await world.keys()) == bool(kept)
    assert await world.checks() == 0


async def test_a_content_that_is_always_deleted_is_given_up(world: World) -> None:
    objects = SteppedObjects(world.folder)

    async def lose() -> None:
        for key in await world.keys():
            await world.objects.delete([key])

    for number in range(1, 4):
        objects.steps["stored", number] = lose
    with pytest.raises(Unavailable) as raised:
        await world.upload(b"x", files=world.made(objects=objects))
    assert (raised.value.error_code, await world.checks()) == ("file_contended", 0)


async def test_a_tenant_that_is_deleted_during_an_upload_leaves_nothing(world: World) -> None:
    objects = SteppedObjects(world.folder)
    objects.steps["stored", 1] = lambda: tenants.delete_tenant(world.db, world.tenant_id)
    with pytest.raises(NotFound) as raised:
        await world.upload(b"x", files=world.made(objects=objects))
    assert raised.value.error_code == "tenant_not_found"
    assert (await world.keys(), await world.checks()) == ([], 0)
    for call in (world.upload(b"x"), world.jobs.add(world.tenant_id, Purpose.BATCH_OUTPUT, "out", pieces(b"x"))):
        with pytest.raises(NotFound):
            await call
    assert (await world.keys(), await world.checks()) == ([], 0)


# Changes in the transaction of the rows.


async def test_files_and_what_belongs_to_them_are_added_together(world: World) -> None:
    async def audited(connection: AsyncConnection, files: Sequence[File]) -> None:
        assert [file.filename for file in files] == ["out", "err", "again"]
        await connection.exec_driver_sql("SELECT 1")

    async def failing(connection: AsyncConnection, files: Sequence[File]) -> None:
        raise ValueError("the lease is lost")

    async with world.jobs.draft() as out, world.jobs.draft() as err:
        await out.write(b"out")
        await err.write(b"err")
        written = [Written(Purpose.BATCH_OUTPUT, name, draft) for name, draft in (("out", out), ("err", err), ("again", out))]
        with pytest.raises(ValueError, match="the lease is lost"):
            await world.jobs.add_written(world.tenant_id, written, failing)
        assert (await world.keys(), await world.checks()) == ([], 0)
        files = await world.jobs.add_written(world.tenant_id, written, audited)
    assert [await content_of(world, file) for file in files] == [b"out", b"err", b"out"]
    assert (len(await world.keys()), await world.checks()) == (2, 0)


async def test_uploads_and_deletions_leave_records(world: World) -> None:
    async with world.gateway.draft() as draft:
        await draft.write(b"x")
        audit = Audit(Action.FILE_CREATE, "inference", "key_1", "req_1")
        file = await world.gateway.upload(world.tenant_id, Written(Purpose.EVALS, "x", draft), audit=audit)
    await world.gateway.delete(world.tenant_id, file.id, audit=Audit(Action.FILE_DELETE, "inference", "key_1", "req_2"))
    async with world.db.begin(SYSTEM) as connection:
        found = await connection.exec_driver_sql("SELECT action, target, request_id FROM audit_log ORDER BY id")
    assert [tuple(row) for row in found] == [("file.create", file.id, "req_1"), ("file.delete", file.id, "req_2")]


# Expiry, and the remains of dead processes.


async def test_expired_files_do_not_exist_and_go(world: World) -> None:
    kept, gone = await world.upload(b"kept", expires_after_s=3600), await world.upload(b"gone", expires_after_s=3600)
    async with world.db.begin(SYSTEM) as connection:
        await connection.exec_driver_sql("UPDATE files SET expires_at = now() - interval '1 s' WHERE id = %s", (gone.id,))
    for call in (world.gateway.get(world.tenant_id, gone.id), world.gateway.delete(world.tenant_id, gone.id)):
        with pytest.raises(NotFound):
            await call
    assert [file.id for file in await rows.list_files(world.db, world.tenant_id, Part(10))] == [kept.id]
    assert await world.controller.stored() == (2, 8)
    while await world.controller.sweep():
        pass
    assert (await world.keys(), await world.checks(), await world.controller.stored()) == ([kept.key], 0, (1, 4))


async def test_many_expired_files_go_in_portions(world: World) -> None:
    fill = (
        "INSERT INTO files (tenant_id, id, purpose, filename, size_bytes, sha256, expires_at) "
        "SELECT %s, 'f' || n, 'batch', 'n', 1, 'sha' || n, now() FROM generate_series(1, 1200) AS n"
    )
    async with world.db.begin(SYSTEM) as connection:
        await connection.exec_driver_sql(fill, (world.tenant_id,))
    sweeps = 0
    while (worked := await world.controller.sweep()) > 0:
        assert worked <= rows.ROWS_AT_ONCE + rows.CHECKS_AT_ONCE
        sweeps += 1
    assert sweeps == 1200 // rows.CHECKS_AT_ONCE
    assert (await world.controller.stored(), await world.checks()) == ((0, 0), 0)


@pytest.mark.parametrize("stage", ["exists", "put", "stored"])
async def test_an_upload_whose_process_dies_leaves_nothing(world: World, stage: str) -> None:
    objects = SteppedObjects(world.folder)
    reached, never = asyncio.Event(), asyncio.Event()

    async def stop() -> None:
        reached.set()
        await never.wait()

    objects.steps[stage, 1] = stop
    upload = asyncio.create_task(world.upload(b"x", files=world.made(objects=objects)))
    await reached.wait()
    # The process is killed, so its own cleaning does not run.
    upload.cancel()
    await asyncio.gather(upload, return_exceptions=True)
    assert (len(await world.keys()), await world.checks()) == (stage == "stored", 1)
    assert await world.controller.sweep() == 0  # the upload might still run
    await world.make_due()
    assert await world.controller.sweep() == 1
    assert (await world.keys(), await world.checks()) == ([], 0)


async def test_what_a_dead_put_has_left_in_a_folder_goes(world: World) -> None:
    sha256 = hashlib.sha256(b"x").hexdigest()
    folder = world.folder / "store" / "files" / world.tenant_id
    folder.mkdir(parents=True)
    old, young = folder / f"{sha256}#1", folder / f"{sha256}#2"
    for path in (old, young):
        path.write_bytes(b"half of x")
    os.utime(old, (0, 0))
    await rows.expect_contents(world.db, world.tenant_id, [sha256])
    await world.make_due()
    assert await world.controller.sweep() == 1
    assert os.listdir(folder) == [young.name]  # its call of `put` may still run


async def test_a_check_that_is_due_spares_a_content_with_a_file(world: World) -> None:
    file = await world.upload(b"x")
    await rows.expect_contents(world.db, world.tenant_id, [file.sha256])
    await world.make_due()
    assert await world.controller.sweep() == 1
    assert (await content_of(world, file), await world.checks()) == (b"x", 0)


async def test_a_store_that_is_away_delays_a_deletion(world: World) -> None:
    objects = SteppedObjects(world.folder)
    file = await world.upload(b"x")
    objects.refuses = True
    await world.made(objects=objects).delete(world.tenant_id, file.id)
    with pytest.raises(NotFound):
        await world.gateway.get(world.tenant_id, file.id)
    assert (await world.keys(), await world.checks()) == ([file.key], 1)
    controller = world.made(DatabaseRole.CONTROLLER, objects)
    with pytest.raises(Unavailable):
        await controller.sweep()
    assert await controller.sweep() == 0  # it does not delay others
    objects.refuses = False
    await world.make_due()
    assert await controller.sweep() == 1
    assert (await world.keys(), await world.checks()) == ([], 0)


async def test_a_store_that_hangs_holds_up_no_deletion(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmaas.files.service.SETTLE_S", 0.01)
    objects, goes_on = SteppedObjects(world.folder), asyncio.Event()
    objects.steps |= {("delete", number): goes_on.wait for number in range(1, SETTLING_AT_ONCE + 1)}
    files = world.made(objects=objects)
    several = [await world.jobs.add(world.tenant_id, Purpose.USER_DATA, "a", pieces(bytes([n]))) for n in range(SETTLING_AT_ONCE + 5)]
    for file in several:
        await files.delete(world.tenant_id, file.id)
    # Two calls wait for the store, and take no more connections to the database than these.
    assert (objects.calls["delete"], await world.checks(), len(await world.keys())) == (2, len(several), len(several))
    goes_on.set()

    async def are_left(count: int) -> bool:
        return await world.checks() == len(await world.keys()) == count

    await until(lambda: are_left(5))
    while await world.controller.sweep():
        pass
    assert await are_left(0)


async def test_files_of_a_deleted_tenant_go(world: World) -> None:
    objects = SteppedObjects(world.folder)
    for number in range(3):
        await world.upload(str(number).encode())
    other = (await tenant(world.db, "globex")).id
    theirs = await world.jobs.add(other, Purpose.BATCH_OUTPUT, "out", pieces(b"0"))
    await tenants.delete_tenant(world.db, world.tenant_id)
    objects.refuses = True
    await world.made(objects=objects).delete_all(world.tenant_id)
    assert (len(await world.keys()), await world.checks()) == (4, 3)
    await world.gateway.delete_all(world.tenant_id)
    assert (await world.keys(), await world.checks()) == ([theirs.key], 0)
