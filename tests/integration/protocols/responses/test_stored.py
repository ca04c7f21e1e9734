"""The state of responses, and the writer that stores responses that end at the same time together, on a real Postgres."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import msgspec
import pytest
from sqlalchemy import create_engine, make_url, text

from lmaas.errors import InvalidRequest, NotFound, SettingsError, Unavailable
from lmaas.observability import GatewayMetrics
from lmaas.protocols.responses import stored, turns
from lmaas.protocols.responses import writer as writing
from lmaas.protocols.responses.items import named
from lmaas.protocols.responses.state import Item, NewResponse
from lmaas.protocols.responses.stored import StoredState
from lmaas.protocols.responses.writer import Writer
from lmaas.store import conversations, responses
from lmaas.store.database import Database, driver_url
from lmaas.store.responses import find_response
from lmaas.store.scopes import SYSTEM
from tests.integration.store.build import tenant
from tests.support.conditions import until

MONTH = timedelta(days=30)


def message(text: str, role: str = "user") -> Item:
    return {"type": "message", "role": role, "status": "completed", "content": [{"type": "input_text", "text": text}]}


def new(number: int, previous: NewResponse | None = None, conversation_id: str | None = None, *, size: int = 0) -> NewResponse:
    """Return a response to `q<number>` with the output `a<number>`."""
    response_id = f"resp_{number:024x}"
    given = named([message(f"q{number}")], response_id)
    output = [{"id": f"msg_{number:024x}0000"} | message(f"a{number}", "assistant")]
    body = msgspec.json.encode({"id": response_id, "object": "response", "output": output, "pad": "x" * size})
    return NewResponse(response_id, body, given, previous.id if previous else None, conversation_id)


def _output(response: NewResponse) -> Item:
    item: Item = msgspec.json.decode(response.body)["output"][0]
    return item


def texts(items: list[Item]) -> list[str]:
    return [item["content"][0]["text"] for item in items]


class Service:
    """The state of responses in a gateway, and its reports."""

    def __init__(self, db: Database) -> None:
        self.db, self.metrics = db, GatewayMetrics()
        self.failed: list[asyncio.Task[None]] = []
        self.writer = Writer(db, self.metrics, MONTH, self._failed)
        self.state = StoredState(db, self.writer)

    def _failed(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and task.exception() is not None:
            self.failed.append(task)

    @property
    def lost(self) -> float:
        return self.metrics.registry.get_sample_value("lmaas_lost_responses_total") or 0.0

    async def chain(self, tenant_id: str, response: NewResponse) -> list[str]:
        return texts(await self.state.context_of(tenant_id, previous_response_id=response.id, conversation_id=None))

    async def conversation(self, tenant_id: str, conversation_id: str) -> list[str]:
        return texts(await self.state.context_of(tenant_id, previous_response_id=None, conversation_id=conversation_id))


@pytest.fixture
async def service(gateway_db: Database) -> AsyncIterator[Service]:
    service = Service(gateway_db)
    yield service
    await service.writer.close()
    assert service.failed == []


@pytest.fixture
async def acme(db: Database) -> str:
    return (await tenant(db, "acme")).id


@contextmanager
def away(url: str) -> Iterator[None]:
    """Make Postgres refuse this database during the block, as when it is down."""
    admin = create_engine(driver_url(make_url(url).set(database="postgres").render_as_string(False)), isolation_level="AUTOCOMMIT")
    name = make_url(url).database
    with admin.connect() as connection:
        connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
        connection.execute(text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"), {"name": name})
        try:
            yield
        finally:
            connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
    admin.dispose()


async def test_a_chain_is_inputs_and_outputs_in_order(service: Service, acme: str) -> None:
    first = new(1)
    second = new(2, first)
    for response in (first, second, new(3, second)):
        await service.state.store(acme, response)
    assert await service.chain(acme, new(3)) == ["q1", "a1", "q2", "a2", "q3", "a3"]
    assert await service.chain(acme, first) == ["q1", "a1"]
    stored = await find_response(service.db, acme, first.id)
    assert stored is not None
    assert (stored.body, msgspec.json.decode(stored.input)) == (first.body, first.input_items)


async def test_a_conversation_grows_by_inputs_and_outputs(service: Service, acme: str) -> None:
    await conversations.create_conversation(service.db, acme, "conv_1", b"{}", [], MONTH)
    for number in (1, 2):
        await service.state.store(acme, new(number, conversation_id="conv_1"))
    assert await service.conversation(acme, "conv_1") == ["q1", "a1", "q2", "a2"]
    await service.state.store(acme, new(3, new(1)))
    assert await service.chain(acme, new(3)) == ["q1", "a1", "q3", "a3"]
    await service.state.store(acme, new(4, new(2)))
    assert await service.chain(acme, new(4)) == ["q1", "a1", "q2", "a2", "q4", "a4"]


HOSTILE = [
    "",
    "resp_none",
    "resp_\0",
    "\0",
    "resp_\ud800",
    "résp_1",
    "resp_' OR true --",
    "../resp_1",
    "resp_" + "0" * 10_000,
    "%00",
    "resp 1",
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
async def test_what_a_tenant_does_not_have_is_the_same_404(service: Service, acme: str, db: Database, name: str) -> None:
    other = await tenant(db, "other")
    theirs = new(1)
    await service.state.store(other.id, theirs)
    await conversations.create_conversation(db, other.id, "conv_1", b"{}", [], MONTH)
    found: dict[tuple[str, str | None], set[str]] = {}
    for previous, conversation in ((theirs.id, None), (name, None), (None, "conv_1"), (None, name)):
        with pytest.raises(NotFound) as caught:
            await service.state.context_of(acme, previous_response_id=previous, conversation_id=conversation)
        error = caught.value
        shown = error.message.replace(((previous or conversation or "")[:100]), "…", 1)
        found.setdefault((error.error_code, error.param), set()).add(shown)
    assert set(found) == {("previous_response_not_found", "previous_response_id"), ("conversation_not_found", "conversation")}
    assert name == "" or all(len(messages) == 1 for messages in found.values())


async def test_items_are_found_by_their_ids(service: Service, acme: str, db: Database) -> None:
    other = await tenant(db, "other")
    await conversations.create_conversation(db, acme, "conv_1", b"{}", [conversations.Item("msg_x", b'{"id":"msg_x"}')], MONTH)
    mine, theirs = new(1), new(2)
    await service.state.store(acme, mine)
    await service.state.store(other.id, theirs)
    wanted = [mine.input_items[0], _output(mine), {"id": "msg_x"}]
    ids = [item["id"] for item in (*wanted, _output(theirs))] + HOSTILE
    found = await service.state.items_of(acme, ids)
    assert len(found) == 3
    assert [found[item["id"]] for item in wanted] == wanted
    assert await service.state.items_of(acme, []) == {}
    with pytest.raises(InvalidRequest):
        await service.state.items_of(acme, [f"msg_{number}" for number in range(1001)])


async def test_a_chain_that_is_too_long_is_refused(service: Service, acme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MAX_CHAIN", 2)
    for number in (1, 2, 3):
        await service.state.store(acme, new(number, new(number - 1) if number > 1 else None))
    assert len(await service.chain(acme, new(2))) == 4
    with pytest.raises(InvalidRequest) as caught:
        await service.chain(acme, new(3))
    assert (caught.value.error_code, caught.value.param) == ("chain_too_large", "previous_response_id")


async def test_a_chain_of_too_many_items_is_refused(service: Service, acme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await service.state.store(acme, new(1))
    await service.state.store(acme, new(2, new(1)))
    monkeypatch.setattr(conversations, "MAX_ITEMS", 3)
    with pytest.raises(InvalidRequest, match="continues more than"):
        await service.chain(acme, new(2))
    assert await service.chain(acme, new(1)) == ["q1", "a1"]


def large(number: int, previous: NewResponse | None = None, *, items: int) -> NewResponse:
    """Return a response with many items in its input."""
    response = new(number, previous)
    return replace(response, input_items=named([message("q" * 100)] * items, response.id))


async def test_other_requests_run_while_a_large_context_is_decoded(service: Service, acme: str) -> None:
    # One response, so its row is one value of the database.
    await service.state.store(acme, large(1, items=9000))
    threads: list[str] = []
    decode = stored.response_items

    def watched(exchange: responses.Exchange) -> list[msgspec.Raw]:
        threads.append(threading.current_thread().name)
        return decode(exchange)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "response_items", watched)
        assert len(await service.chain(acme, new(1))) == 9001
        await service.state.store(acme, new(2))
        assert len(await service.chain(acme, new(2))) == 2
    large_one, small_one = threads
    assert small_one == threading.current_thread().name != large_one


async def test_tools_and_other_fields_are_no_part_of_a_chain(service: Service, acme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MAX_CHAIN_BYTES", 10_000)
    for number in range(1, 6):
        await service.state.store(acme, new(number, new(number - 1) if number > 1 else None, size=50_000))
    assert len(await service.chain(acme, new(5))) == 10
    assert await service.state.items_of(acme, [_output(new(5))["id"]]) == {_output(new(5))["id"]: _output(new(5))}


async def test_references_to_too_much_are_refused_by_their_size(service: Service, acme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await service.state.store(acme, new(1))
    monkeypatch.setattr(responses, "MAX_CHAIN_BYTES", 100)
    with pytest.raises(InvalidRequest, match="more than 100 bytes") as caught:
        await service.state.items_of(acme, [_output(new(1))["id"]])
    assert caught.value.error_code == "references_too_large"


async def test_a_postgres_that_hangs_is_an_error(service: Service, acme: str, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    await service.state.store(acme, new(1))
    await conversations.create_conversation(service.db, acme, "conv_1", b"{}", [], MONTH)
    monkeypatch.setattr(turns, "READ_S", 0.2)
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text("LOCK TABLE responses, conversations"))
        async with asyncio.timeout(10):
            for reading in (
                lambda: service.chain(acme, new(1)),
                lambda: service.conversation(acme, "conv_1"),
                lambda: service.state.items_of(acme, ["msg_1"]),
            ):
                with pytest.raises(Unavailable) as caught:
                    await reading()
                assert caught.value.error_code == "database_unavailable"
    # The abandoned readings end, and the tenant can read again.
    monkeypatch.setattr(turns, "READ_S", 10.0)
    assert await service.chain(acme, new(1)) == ["q1", "a1"]


async def test_responses_that_end_together_are_stored_together(service: Service, acme: str, db: Database) -> None:
    async with db.begin(SYSTEM) as connection:
        before = (await connection.execute(text("SELECT pg_current_xact_id()::text::bigint"))).scalar_one()
    await asyncio.gather(*(service.state.store(acme, new(number)) for number in range(1, 301)))
    async with db.begin(SYSTEM) as connection:
        after = (await connection.execute(text("SELECT pg_current_xact_id()::text::bigint"))).scalar_one()
        assert (await connection.execute(text("SELECT count(*) FROM responses"))).scalar_one() == 300
    assert after - before <= 6  # this one, and at most 256 responses each


async def test_responses_of_many_tenants_that_end_together_are_stored_together(service: Service, db: Database) -> None:
    tenants = [(await tenant(db, f"tenant-{number}")).id for number in range(20)]
    async with db.begin(SYSTEM) as connection:
        before = (await connection.execute(text("SELECT pg_current_xact_id()::text::bigint"))).scalar_one()
    await asyncio.gather(*(service.state.store(tenant_id, new(number)) for number in range(5) for tenant_id in tenants))
    async with db.begin(SYSTEM) as connection:
        after = (await connection.execute(text("SELECT pg_current_xact_id()::text::bigint"))).scalar_one()
    assert after - before <= 10  # far fewer than tenants
    for tenant_id in tenants:
        for number in range(5):
            assert await find_response(service.db, tenant_id, new(number).id) is not None


async def test_turns_of_one_conversation_are_stored_in_the_order_of_their_ends(service: Service, acme: str) -> None:
    await conversations.create_conversation(service.db, acme, "conv_1", b"{}", [], MONTH)
    ended = [new(number, conversation_id="conv_1" if number % 3 else None) for number in range(1, 31)]
    await asyncio.gather(*(service.state.store(acme, response) for response in ended))
    expected = [f"{kind}{number}" for number in range(1, 31) if number % 3 for kind in "qa"]
    assert await service.conversation(acme, "conv_1") == expected
    for response in ended:
        assert await find_response(service.db, acme, response.id) is not None


async def test_two_gateways_and_one_conversation(service: Service, acme: str) -> None:
    await conversations.create_conversation(service.db, acme, "conv_1", b"{}", [], MONTH)
    second = Service(service.db)
    stores = [
        each.state.store(acme, new(10 * n + m, conversation_id="conv_1")) for n in range(1, 6) for m, each in enumerate((service, second))
    ]
    await asyncio.gather(*stores)
    found = await service.conversation(acme, "conv_1")
    assert len(found) == 20
    assert all(question[1:] == answer[1:] for question, answer in zip(found[::2], found[1::2], strict=True))


async def test_without_postgres_the_client_waits_briefly_and_the_response_is_stored_later(
    service: Service, acme: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "STORE_S", 0.2)
    monkeypatch.setattr(writing, "AGAIN_S", 0.05)
    ended = [new(number) for number in range(1, 21)]
    with away(database_url):
        async with asyncio.timeout(20):
            await asyncio.gather(*(service.state.store(acme, response) for response in ended))
    await service.writer.drained()
    for response in ended:
        assert await find_response(service.db, acme, response.id) is not None
    assert service.lost == 0


async def test_a_postgres_that_hangs_holds_up_no_client(service: Service, acme: str, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "STORE_S", 0.2)
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text("LOCK TABLE responses"))
        async with asyncio.timeout(10):
            await service.state.store(acme, new(1))
    await service.writer.drained()
    assert await find_response(service.db, acme, new(1).id) is not None


async def test_what_waits_is_bounded_and_what_is_lost_is_reported(
    service: Service, acme: str, db: Database, database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writing, "STORE_S", 0.01)
    monkeypatch.setattr(writing, "AGAIN_S", 0.05)
    monkeypatch.setattr(writing, "MAX_TENANT_BYTES", 10_000)
    monkeypatch.setattr(writing, "MAX_WAITING_BYTES", 14_000)
    others = [(await tenant(db, name)).id for name in ("globex", "initech")]
    with away(database_url), caplog.at_level(logging.ERROR):
        for number in range(1, 5):
            await service.state.store(acme, new(number, size=2600))
        assert service.lost == 1
        # The others have room until the common limit is reached.
        await service.state.store(others[0], new(5, size=2600))
        assert service.lost == 1
        await service.state.store(others[1], new(6, size=2600))
        assert service.lost == 2
    assert [record.detail for record in caplog.records] == [new(4).id, new(6).id]  # type: ignore[attr-defined]
    await service.writer.drained()
    assert [await find_response(service.db, acme, new(number).id) is not None for number in range(1, 5)] == [True, True, True, False]
    # All room is free again.
    await service.state.store(acme, new(7, size=8000))
    assert service.lost == 2


async def test_a_response_waits_for_room(service: Service, acme: str, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many large responses end at the same time, and Postgres is available."""
    other = (await tenant(db, "other")).id
    await conversations.create_conversation(service.db, acme, "conv_1", b"{}", [], MONTH)
    monkeypatch.setattr(writing, "STORE_S", 20.0)
    monkeypatch.setattr(writing, "MAX_TENANT_BYTES", 10_000)
    monkeypatch.setattr(writing, "MAX_WAITING_BYTES", 14_000)
    ended = [new(number, conversation_id="conv_1", size=4000) for number in range(1, 11)]
    # One exceeds the limits: it waits alone.
    others = [new(number, size=20_000 if number == 25 else 4000) for number in range(21, 31)]
    stores = [(acme, each) for each in ended] + [(other, each) for each in others]
    await asyncio.gather(*(service.state.store(*each) for each in stores))
    assert service.lost == 0
    for tenant_id, each in stores:
        assert await find_response(service.db, tenant_id, each.id) is not None
    assert await service.conversation(acme, "conv_1") == [f"{kind}{number}" for number in range(1, 11) for kind in "qa"]


@pytest.mark.parametrize("error", [ValueError("odd text of a tenant"), SettingsError("The login may not.")])
async def test_a_response_that_cannot_be_stored_is_lost_alone(
    service: Service, acme: str, db: Database, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = (await tenant(db, "other")).id
    save_together = responses.save_together
    bad = new(3).id

    async def failing(db: Database, batches: Sequence[tuple[str, Sequence[responses.Response]]], kept_for: timedelta) -> None:
        if any(each.id == bad for _, batch in batches for each in batch):
            raise error
        await save_together(db, batches, kept_for)

    monkeypatch.setattr(writing, "save_together", failing)
    stores = [(acme, new(number)) for number in range(1, 6)] + [(other, new(number)) for number in range(6, 9)]
    with caplog.at_level(logging.ERROR):
        async with asyncio.timeout(10):
            await asyncio.gather(*(service.state.store(*each) for each in stores))
    found = [await find_response(service.db, tenant_id, each.id) is not None for tenant_id, each in stores]
    assert found == [each.id != bad for _, each in stores]
    assert service.lost == 1
    assert "odd text" not in caplog.text
    await service.state.store(acme, new(9))
    assert await find_response(service.db, acme, new(9).id) is not None


async def test_a_shutdown_without_postgres_reports_what_is_lost(
    service: Service, acme: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "STORE_S", 0.01)
    with away(database_url):
        for number in range(1, 4):
            await service.state.store(acme, new(number))
        await service.writer.close()
    assert service.lost == 3


async def test_one_tenants_long_wait_does_not_hold_up_another(
    service: Service, acme: str, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "STORE_S", 5.0)
    other = await tenant(db, "other")
    await conversations.create_conversation(service.db, acme, "conv_1", b"{}", [], MONTH)
    async with db.begin(SYSTEM) as connection:
        await connection.execute(text("SELECT FROM conversations FOR UPDATE"))
        stuck = asyncio.create_task(service.state.store(acme, new(1, conversation_id="conv_1")))

        async def waits() -> bool:
            return bool((await connection.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))).scalar_one())

        await until(waits, every_s=0.01)
        await service.state.store(other.id, new(2))
        assert await find_response(service.db, other.id, new(2).id) is not None
        assert not stuck.done()
    await stuck
    assert await service.conversation(acme, "conv_1") == ["q1", "a1"]
