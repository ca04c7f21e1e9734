"""One active controller: the lock, what is written under it, and a holder that stands still."""

import asyncio
from contextlib import suppress

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from lmaas.store.database import Database
from lmaas.store.leadership import LostLead, leading
from lmaas.store.replicas import add_replica, list_replicas
from lmaas.store.rights import DatabaseRole
from lmaas.store.scopes import SYSTEM
from tests.integration.store.build import base_model
from tests.support.conditions import until
from tests.support.databases import login_url


async def test_one_at_a_time(controller_db: Database, database_url: str) -> None:
    other = Database(login_url(database_url, DatabaseRole.CONTROLLER), DatabaseRole.CONTROLLER)
    seen: list[str] = []

    async def second() -> None:
        async with leading(other, check_s=0.05):
            seen.append("second")

    async with leading(controller_db) as lead:
        task = asyncio.create_task(second())
        for _ in range(5):
            await asyncio.sleep(0.1)
            await lead.check()
        assert seen == []
    await until(lambda: seen == ["second"])
    await task
    await other.close()


async def test_a_holder_that_is_silent_is_deposed_and_can_write_nothing_more(
    db: Database, controller_db: Database, database_url: str
) -> None:
    other = Database(login_url(database_url, DatabaseRole.CONTROLLER), DatabaseRole.CONTROLLER)
    model = await base_model(db)
    async with leading(controller_db) as stuck:
        assert await add_replica(stuck, "rep_before", model.id)
        # It sends nothing, like a process that is stopped.
        async with leading(other, check_s=0.05, silent_s=0.5) as active:
            assert await add_replica(active, "rep_new", model.id)
            with pytest.raises(LostLead):
                await add_replica(stuck, "rep_late", model.id)
            with pytest.raises(LostLead):
                await stuck.check()
            await active.check()
    assert {row.id for row in await list_replicas(db)} == {"rep_before", "rep_new"}
    await other.close()


async def test_a_holder_that_speaks_is_not_deposed(controller_db: Database, database_url: str) -> None:
    other = Database(login_url(database_url, DatabaseRole.CONTROLLER), DatabaseRole.CONTROLLER)
    taken = asyncio.Event()

    async def second() -> None:
        async with leading(other, check_s=0.05, silent_s=2.0):
            taken.set()

    async with leading(controller_db) as lead:
        task = asyncio.create_task(second())
        for _ in range(30):
            await lead.check()
            await asyncio.sleep(0.1)
        assert not taken.is_set()
    await until(taken.is_set)
    await task
    await other.close()


async def test_what_the_active_one_writes_it_writes_as_its_role(database_url: str) -> None:
    one_for_all = Database(database_url, DatabaseRole.CONTROLLER)
    async with leading(one_for_all) as lead:
        for _ in range(2):
            async with lead.begin(SYSTEM) as connection:
                assert (await connection.execute(text("SELECT current_user"))).scalar_one() == "lmaas_controller"
        with pytest.raises(ValueError, match="SYSTEM"):
            async with lead.begin("ten_a"):
                pytest.fail("that is not for it")
        with pytest.raises(ProgrammingError):
            async with lead.begin(SYSTEM) as connection:
                await connection.execute(text("SELECT nothing"))
        await lead.check()
    await one_for_all.close()


async def test_a_lock_in_another_database_is_another(controller_db: Database, postgres_url: str) -> None:
    elsewhere = Database(login_url(postgres_url, DatabaseRole.CONTROLLER), DatabaseRole.CONTROLLER)
    async with leading(elsewhere) as theirs, leading(controller_db, check_s=0.05, silent_s=0.0) as ours:
        await theirs.check()
        await ours.check()
    await elsewhere.close()


async def test_the_first_word_of_a_lost_lead_is_an_error(controller_db: Database, database_url: str) -> None:
    other = Database(login_url(database_url, DatabaseRole.CONTROLLER), DatabaseRole.CONTROLLER)
    lost = False
    async with leading(controller_db) as stuck:
        async with leading(other, check_s=0.05, silent_s=0.2):
            pass
        with suppress(LostLead):
            async with asyncio.timeout(30):
                await stuck.lost()
                pytest.fail("it goes on")
        lost = True
    assert lost
    await other.close()
