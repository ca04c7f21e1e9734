"""Stored conversations, on a real Postgres."""

import asyncio
from datetime import timedelta

import pytest
from sqlalchemy import text

from lmaas.errors import InvalidRequest, NotFound
from lmaas.store import conversations
from lmaas.store.conversations import (
    Item,
    add_items,
    change_metadata,
    create_conversation,
    delete_conversation,
    delete_item,
    find_context,
    find_items,
    get_conversation,
    get_item,
    list_items,
    save_turn,
)
from lmaas.store.database import Database
from lmaas.store.paging import Part
from lmaas.store.responses import Response, find_response
from lmaas.store.scopes import SYSTEM
from tests.integration.store.build import tenant
from tests.integration.store.test_responses import MONTH, age


def items(*names: str) -> list[Item]:
    return [Item(name, b'{"id":"%s"}' % name.encode()) for name in names]


def names(found: list[Item]) -> list[str]:
    return [item.id for item in found]


async def sizes(db: Database) -> tuple[int, int, int, int]:
    """Return the recorded and the actual count and size of the only conversation's items."""
    async with db.begin(SYSTEM) as connection:
        count, size = (
            await connection.execute(text("SELECT item_count, size_bytes - octet_length(metadata) - 256 FROM conversations"))
        ).one()
        query = text("SELECT count(*), coalesce(sum(octet_length(body) + 256), 0) FROM conversation_items")
        return (count, size, *(await connection.execute(query)).one())


@pytest.fixture
async def acme(db: Database, gateway_db: Database) -> str:
    """A tenant with one conversation."""
    row = await tenant(db, "acme")
    await create_conversation(gateway_db, row.id, "conv_1", b'{"a":"1"}', items("msg_1", "msg_2"), MONTH)
    return row.id


async def test_a_conversation_is_stored_changed_and_deleted(db: Database, gateway_db: Database, acme: str) -> None:
    found = await get_conversation(gateway_db, acme, "conv_1")
    assert (found.id, found.metadata) == ("conv_1", b'{"a":"1"}')
    changed = await change_metadata(gateway_db, acme, "conv_1", b"{}", MONTH)
    assert (changed.metadata, changed.created_at) == (b"{}", found.created_at)
    count, size, counted, summed = await sizes(db)
    assert (count, size) == (counted, summed) == (2, 28 + 512)
    assert await get_conversation(gateway_db, acme, "conv_1") == changed
    await delete_conversation(gateway_db, acme, "conv_1")
    async with db.begin(SYSTEM) as connection:
        assert (await connection.execute(text("SELECT count(*) FROM conversation_items"))).scalar_one() == 0
    for call in (
        get_conversation(gateway_db, acme, "conv_1"),
        change_metadata(gateway_db, acme, "conv_1", b"{}", MONTH),
        delete_conversation(gateway_db, acme, "conv_1"),
        add_items(gateway_db, acme, "conv_1", items("msg_3"), MONTH),
        list_items(gateway_db, acme, "conv_1", Part(10), newest_first=False),
        get_item(gateway_db, acme, "conv_1", "msg_1"),
        delete_item(gateway_db, acme, "conv_1", "msg_1", MONTH),
        find_context(gateway_db, acme, "conv_1"),
    ):
        with pytest.raises(NotFound) as caught:
            await call
        assert caught.value.error_code == "conversation_not_found"


async def test_items_are_listed_in_parts_in_both_orders(gateway_db: Database, acme: str) -> None:
    await add_items(gateway_db, acme, "conv_1", items("msg_3", "msg_4"), MONTH)
    # As many as requested and one more, which shows that there are more.
    assert names(await list_items(gateway_db, acme, "conv_1", Part(2), newest_first=False)) == ["msg_1", "msg_2", "msg_3"]
    assert names(await list_items(gateway_db, acme, "conv_1", Part(2, "msg_2"), newest_first=False)) == ["msg_3", "msg_4"]
    assert names(await list_items(gateway_db, acme, "conv_1", Part(9), newest_first=True)) == ["msg_4", "msg_3", "msg_2", "msg_1"]
    assert names(await list_items(gateway_db, acme, "conv_1", Part(9, "msg_3"), newest_first=True)) == ["msg_2", "msg_1"]
    await create_conversation(gateway_db, acme, "conv_2", b"{}", items("msg_9"), MONTH)
    with pytest.raises(InvalidRequest, match="'after'"):
        await list_items(gateway_db, acme, "conv_1", Part(9, "msg_9"), newest_first=False)


async def test_an_item_is_found_and_deleted(db: Database, gateway_db: Database, acme: str) -> None:
    assert await get_item(gateway_db, acme, "conv_1", "msg_2") == items("msg_2")[0]
    assert await find_items(gateway_db, acme, ["msg_2", "msg_9"]) == items("msg_2")
    assert (await delete_item(gateway_db, acme, "conv_1", "msg_2", MONTH)).id == "conv_1"
    with pytest.raises(NotFound) as caught:
        await get_item(gateway_db, acme, "conv_1", "msg_2")
    assert caught.value.error_code == "item_not_found"
    with pytest.raises(NotFound):
        await delete_item(gateway_db, acme, "conv_1", "msg_2", MONTH)
    assert await find_items(gateway_db, acme, ["msg_2"]) == []
    # A new item does not take the place of the deleted one.
    await add_items(gateway_db, acme, "conv_1", items("msg_3"), MONTH)
    assert await find_context(gateway_db, acme, "conv_1") == [item.body for item in items("msg_1", "msg_3")]
    count, size, counted, summed = await sizes(db)
    assert (count, size) == (counted, summed) == (2, 28 + 512)


async def test_turns_at_once_append_one_after_the_other(db: Database, gateway_db: Database, acme: str) -> None:
    turns = [items(*(f"msg_{turn}_{number}" for number in range(5))) for turn in range(20)]

    async def save(turn: int) -> None:
        await save_turn(gateway_db, acme, Response(f"resp_{turn}", b"[]", b"{}"), "conv_1", turns[turn], MONTH)

    await asyncio.gather(*map(save, range(20)))
    found = names(await list_items(gateway_db, acme, "conv_1", Part(200), newest_first=False))
    assert found[:2] == ["msg_1", "msg_2"]
    together = [found[start : start + 5] for start in range(2, len(found), 5)]
    assert sorted(together) == sorted(names(turn) for turn in turns)
    count, size, counted, summed = await sizes(db)
    assert (count, size) == (counted, summed)


async def test_a_turn_is_stored_once(gateway_db: Database, acme: str) -> None:
    turn = Response("resp_1", b"[]", b"{}")
    for _ in range(2):
        await save_turn(gateway_db, acme, turn, "conv_1", items("msg_3"), MONTH)
    await asyncio.gather(*(save_turn(gateway_db, acme, turn, "conv_1", items("msg_3"), MONTH) for _ in range(5)))
    assert names(await list_items(gateway_db, acme, "conv_1", Part(9), newest_first=False)) == ["msg_1", "msg_2", "msg_3"]


async def test_a_turn_of_a_deleted_conversation_is_a_response_only(db: Database, gateway_db: Database, acme: str) -> None:
    await delete_conversation(gateway_db, acme, "conv_1")
    turn = Response("resp_1", b"[]", b"{}")
    await save_turn(gateway_db, acme, turn, "conv_1", items("msg_3"), MONTH)
    assert await find_response(gateway_db, acme, "resp_1") == turn
    assert await find_items(gateway_db, acme, ["msg_3"]) == []


async def test_a_conversation_lasts_from_its_last_change(db: Database, gateway_db: Database, acme: str) -> None:
    changes = (
        lambda: add_items(gateway_db, acme, "conv_1", items("msg_3"), MONTH),
        lambda: change_metadata(gateway_db, acme, "conv_1", b"{}", MONTH),
        lambda: save_turn(gateway_db, acme, Response("resp_1", b"[]", b"{}"), "conv_1", items("msg_4"), MONTH),
        lambda: delete_item(gateway_db, acme, "conv_1", "msg_1", MONTH),
    )
    for change in changes:
        await age(db, "29 days", "conversations")
        await change()
    await age(db, "29 days", "conversations")
    assert await find_context(gateway_db, acme, "conv_1") == [item.body for item in items("msg_2", "msg_3", "msg_4")]
    await age(db, "2 days", "conversations")
    with pytest.raises(NotFound):
        await find_context(gateway_db, acme, "conv_1")
    assert await find_items(gateway_db, acme, ["msg_2"]) == []
    await save_turn(gateway_db, acme, Response("resp_2", b"[]", b"{}"), "conv_1", items("msg_5"), MONTH)
    assert (await sizes(db))[2] == 3


async def test_a_full_conversation_takes_no_more(db: Database, gateway_db: Database, acme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = await sizes(db)
    for limit, value in (("MAX_ITEMS", 3), ("MAX_BYTES", 900)):
        with monkeypatch.context() as patch:
            patch.setattr(conversations, limit, value)
            with pytest.raises(InvalidRequest, match="at most") as caught:
                await add_items(gateway_db, acme, "conv_1", items("msg_3", "msg_4"), MONTH)
            assert caught.value.error_code == "conversation_full"
            assert await sizes(db) == before
            assert len(await find_context(gateway_db, acme, "conv_1")) == 2
            # The end of a response is stored all the same, and the next one does not begin.
            await save_turn(gateway_db, acme, Response(limit, b"[]", b"{}"), "conv_1", items("msg_5", "msg_6"), MONTH)
            with pytest.raises(InvalidRequest, match="at most"):
                await find_context(gateway_db, acme, "conv_1")
            for name in ("msg_5", "msg_6"):
                await delete_item(gateway_db, acme, "conv_1", name, timedelta(days=1))
    await add_items(gateway_db, acme, "conv_1", items("msg_3", "msg_4"), MONTH)


async def test_items_that_are_too_large_together_are_not_read(gateway_db: Database, acme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(items("msg_1")[0].body)
    monkeypatch.setattr(conversations, "MAX_BYTES", size)
    assert names(await find_items(gateway_db, acme, ["msg_1"])) == ["msg_1"]
    with pytest.raises(InvalidRequest, match="have more than") as caught:
        await find_items(gateway_db, acme, ["msg_2", "msg_1"])
    assert caught.value.error_code == "references_too_large"


@pytest.mark.parametrize(("limit", "value"), [("MAX_ITEMS", 1), ("MAX_BYTES", 900)])
async def test_a_conversation_does_not_begin_too_large(
    db: Database, gateway_db: Database, acme: str, limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await sizes(db)
    monkeypatch.setattr(conversations, limit, value)
    with pytest.raises(InvalidRequest, match="at most") as caught:
        await create_conversation(gateway_db, acme, "conv_9", b"{}", items(*(f"msg_{number}" for number in range(10, 14))), MONTH)
    assert caught.value.error_code == "conversation_full"
    assert await sizes(db) == before
