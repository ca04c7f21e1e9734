"""Stored responses, on a real Postgres."""

import asyncio
import secrets
from collections.abc import Sequence
from datetime import timedelta

import pytest
from sqlalchemy import text

from lmaas.errors import InvalidRequest
from lmaas.store import responses
from lmaas.store.background import delete_response
from lmaas.store.conversations import Item, create_conversation, delete_conversation, delete_item, save_turn
from lmaas.store.database import Database
from lmaas.store.responses import (
    Chain,
    Exchange,
    Response,
    find_chain,
    find_exchanges,
    find_response,
    save,
)
from lmaas.store.scopes import SYSTEM
from lmaas.store.tenants import delete_tenant
from tests.integration.store.build import tenant

MONTH = timedelta(days=30)


def response(name: str, previous: str | None = None, *, size: int = 0) -> Response:
    output = b'["%s out"]' % name.encode()
    body = b'{"tools":1,"output":' + output + b"}" + b" " * size
    return Response(name, b'["%s in"]' % name.encode(), body, previous, body.index(output), len(output))


def exchanges(stored: Sequence[Response]) -> list[Exchange]:
    return [Exchange(each.input, b'["%s out"]' % each.id.encode()) for each in stored]


async def age(db: Database, interval: str, table: str = "responses") -> None:
    """Age the rows."""
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text(f"UPDATE {table} SET expires_at = expires_at - CAST(:age AS interval)"), {"age": interval})  # noqa: S608 (our own names)


async def test_a_response_is_stored_found_and_deleted(db: Database, gateway_db: Database) -> None:
    acme, globex = await tenant(db, "acme"), await tenant(db, "globex")
    first = Response("resp_1", b"[]", b'{"nul":"\\u0000"}\x00\xff')
    await save(gateway_db, acme.id, [first, response("resp_2", "resp_1")], MONTH)
    assert await find_response(gateway_db, acme.id, "resp_1") == first
    assert await find_response(gateway_db, acme.id, "resp_2") == response("resp_2", "resp_1")
    assert await find_response(gateway_db, globex.id, "resp_1") is None
    assert not await delete_response(gateway_db, globex.id, "resp_1")
    assert await delete_response(gateway_db, acme.id, "resp_1")
    assert not await delete_response(gateway_db, acme.id, "resp_1")
    assert await find_response(gateway_db, acme.id, "resp_1") is None
    async with db.begin(SYSTEM) as connection:
        assert (await connection.execute(text("SELECT id FROM responses"))).scalars().all() == ["resp_2"]


async def test_two_tenants_have_responses_of_the_same_id(db: Database, gateway_db: Database) -> None:
    acme, globex = await tenant(db, "acme"), await tenant(db, "globex")
    for each, body in ((acme, b"1"), (globex, b"2")):
        await save(gateway_db, each.id, [Response("resp_1", b"[]", body)], MONTH)
    found = [await find_response(gateway_db, each.id, "resp_1") for each in (acme, globex)]
    assert [each.body for each in found if each] == [b"1", b"2"]


async def test_a_response_that_is_stored_again_stays_as_it_is(db: Database, gateway_db: Database) -> None:
    acme = await tenant(db, "acme")
    await save(gateway_db, acme.id, [response("resp_1")], MONTH)
    await save(gateway_db, acme.id, [Response("resp_1", b"[]", b"other"), response("resp_2")], MONTH)
    assert await find_response(gateway_db, acme.id, "resp_1") == response("resp_1")
    assert await find_response(gateway_db, acme.id, "resp_2") == response("resp_2")


async def test_a_chain_is_read_oldest_first(db: Database, gateway_db: Database) -> None:
    acme, globex = await tenant(db, "acme"), await tenant(db, "globex")
    chain = [response("resp_1"), response("resp_2", "resp_1"), response("resp_3", "resp_2"), response("resp_4", "resp_2")]
    await save(gateway_db, acme.id, chain, MONTH)
    assert await find_chain(gateway_db, acme.id, "resp_1") == Chain((), exchanges(chain[:1]))
    assert await find_chain(gateway_db, acme.id, "resp_3") == Chain((), exchanges(chain[:3]))
    assert await find_chain(gateway_db, acme.id, "resp_4") == Chain((), exchanges([chain[0], chain[1], chain[3]]))
    assert await find_chain(gateway_db, globex.id, "resp_3") is None
    assert await find_chain(gateway_db, acme.id, "resp_9") is None


async def test_a_chain_without_one_of_its_responses_is_none(db: Database, gateway_db: Database) -> None:
    acme = await tenant(db, "acme")
    chain = [response("resp_1"), response("resp_2", "resp_1"), response("resp_3", "resp_2")]
    await save(gateway_db, acme.id, chain, MONTH)
    await delete_response(gateway_db, acme.id, "resp_2")
    assert await find_chain(gateway_db, acme.id, "resp_3") is None
    assert await find_chain(gateway_db, acme.id, "resp_1") == Chain((), exchanges(chain[:1]))
    assert await find_response(gateway_db, acme.id, "resp_3") == chain[2]


async def test_a_chain_of_another_tenants_response_does_not_go_on_there(db: Database, gateway_db: Database) -> None:
    acme, globex = await tenant(db, "acme"), await tenant(db, "globex")
    await save(gateway_db, globex.id, [response("resp_1")], MONTH)
    await save(gateway_db, acme.id, [response("resp_2", "resp_1")], MONTH)
    assert await find_chain(gateway_db, acme.id, "resp_2") is None


async def test_a_chain_has_limits(db: Database, gateway_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    acme = await tenant(db, "acme")
    chain = [response("resp_0"), *(response(f"resp_{number}", f"resp_{number - 1}", size=100) for number in range(1, 10))]
    await save(gateway_db, acme.id, chain, MONTH)
    monkeypatch.setattr(responses, "MAX_CHAIN", 10)
    assert await find_chain(gateway_db, acme.id, "resp_9") == Chain((), exchanges(chain))
    monkeypatch.setattr(responses, "MAX_CHAIN", 9)
    assert await find_chain(gateway_db, acme.id, "resp_9") == Chain((), (), whole=False)
    assert await find_chain(gateway_db, acme.id, "resp_8") == Chain((), exchanges(chain[:9]))
    monkeypatch.setattr(responses, "MAX_CHAIN", 1000)
    # Only inputs and outputs count, not other parts of a response, such as its tools.
    size = len(b'["resp_0 in"]') + len(b'["resp_0 out"]') + responses.ROW_BYTES
    monkeypatch.setattr(responses, "MAX_CHAIN_BYTES", 10 * size)
    assert await find_chain(gateway_db, acme.id, "resp_9") == Chain((), exchanges(chain))
    monkeypatch.setattr(responses, "MAX_CHAIN_BYTES", 10 * size - 1)
    assert await find_chain(gateway_db, acme.id, "resp_9") == Chain((), (), whole=False)
    monkeypatch.setattr(responses, "MAX_CHAIN_BYTES", size - 1)
    assert await find_chain(gateway_db, acme.id, "resp_0") == Chain((), (), whole=False)


async def test_a_chain_that_began_in_a_conversation_has_what_was_there_before(db: Database, gateway_db: Database) -> None:
    acme = await tenant(db, "acme")
    items = [Item(f"msg_{number}", b'{"n":%d}' % number) for number in range(4)]
    await create_conversation(gateway_db, acme.id, "conv_1", b"{}", items[:2], MONTH)
    await save_turn(gateway_db, acme.id, response("resp_1"), "conv_1", items[2:3], MONTH)
    await save_turn(gateway_db, acme.id, response("resp_2"), "conv_1", items[3:], MONTH)
    await save(gateway_db, acme.id, [response("resp_3", "resp_1")], MONTH)
    both = exchanges([response("resp_1"), response("resp_3", "resp_1")])
    assert await find_chain(gateway_db, acme.id, "resp_3") == Chain([items[0].body, items[1].body], both)
    await delete_item(gateway_db, acme.id, "conv_1", "msg_0", MONTH)
    assert await find_chain(gateway_db, acme.id, "resp_3") == Chain([items[1].body], both)
    size = sum(len(each.input) + len(each.output) + responses.ROW_BYTES for each in both)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(responses, "MAX_CHAIN_BYTES", size + len(items[1].body) + responses.ROW_BYTES - 1)
        assert await find_chain(gateway_db, acme.id, "resp_3") == Chain((), (), whole=False)
    await delete_conversation(gateway_db, acme.id, "conv_1")
    assert await find_chain(gateway_db, acme.id, "resp_3") is None
    assert await find_response(gateway_db, acme.id, "resp_1") == response("resp_1")


async def test_an_expired_response_is_found_no_more(db: Database, gateway_db: Database) -> None:
    acme = await tenant(db, "acme")
    await save(gateway_db, acme.id, [response("resp_1")], MONTH)
    await age(db, "29 days 23 hours")
    await save(gateway_db, acme.id, [response("resp_2", "resp_1")], MONTH)
    assert await find_chain(gateway_db, acme.id, "resp_2") is not None
    await age(db, "2 hours")
    assert await find_response(gateway_db, acme.id, "resp_1") is None
    assert await find_chain(gateway_db, acme.id, "resp_1") is None
    assert await find_chain(gateway_db, acme.id, "resp_2") is None
    assert await find_exchanges(gateway_db, acme.id, ["resp_1", "resp_2"]) == exchanges([response("resp_2", "resp_1")])
    assert not await delete_response(gateway_db, acme.id, "resp_1")


async def test_responses_that_are_too_large_together_are_not_read(
    db: Database, gateway_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = await tenant(db, "acme")
    stored = [response(f"resp_{number}", size=1000) for number in range(4)]
    await save(gateway_db, acme.id, stored, MONTH)
    ids = [each.id for each in stored]
    size = sum(len(each.input) + len(each.output) + responses.ROW_BYTES for each in exchanges(stored))
    monkeypatch.setattr(responses, "MAX_CHAIN_BYTES", size)
    assert sorted(each.input for each in await find_exchanges(gateway_db, acme.id, ids)) == [each.input for each in stored]
    monkeypatch.setattr(responses, "MAX_CHAIN_BYTES", size - 1)
    with pytest.raises(InvalidRequest, match="have more than") as caught:
        await find_exchanges(gateway_db, acme.id, ids)
    assert (caught.value.error_code, caught.value.param) == ("references_too_large", "input")


async def test_nothing_is_stored_for_a_deleted_tenant(db: Database, gateway_db: Database) -> None:
    acme = await tenant(db, "acme")
    await create_conversation(gateway_db, acme.id, "conv_1", b"{}", [], MONTH)
    await save(gateway_db, acme.id, [response("resp_1")], MONTH)
    await delete_tenant(gateway_db, acme.id)
    await save(gateway_db, acme.id, [response("resp_2")], MONTH)
    await save_turn(gateway_db, acme.id, response("resp_3"), "conv_1", [Item("msg_1", b"{}")], MONTH)
    async with db.begin(SYSTEM) as connection:
        for table in ("responses", "conversations", "conversation_items"):
            assert (await connection.execute(text(f"SELECT count(*) FROM {table}"))).scalar_one() == 0  # noqa: S608 (our own names)


async def test_a_deletion_of_the_tenant_leaves_nothing_that_is_stored_meanwhile(db: Database, gateway_db: Database) -> None:
    acme = await tenant(db, "acme")

    async def keep_on() -> None:
        for _ in range(30):
            await save(gateway_db, acme.id, [response(f"resp_{secrets.token_hex(4)}")], MONTH)

    writers = [asyncio.create_task(keep_on()) for _ in range(3)]
    await delete_tenant(db, acme.id)
    await asyncio.gather(*writers)
    async with db.begin(SYSTEM) as connection:
        assert (await connection.execute(text("SELECT count(*) FROM responses"))).scalar_one() == 0
