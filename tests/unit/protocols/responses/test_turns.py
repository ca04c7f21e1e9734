"""The turns of tenants whose earlier items are read."""

import asyncio

import pytest

from lmaas.errors import InvalidRequest, OverLimit, Unavailable
from lmaas.protocols.responses import items, turns
from lmaas.protocols.responses.protocol import Responses
from lmaas.protocols.responses.request import read_response
from lmaas.protocols.responses.state import Item
from lmaas.protocols.responses.turns import Turns
from tests.support.conditions import until
from tests.unit.protocols.responses.build import NoState


class Readings:
    """Readings that end when the test allows it."""

    def __init__(self) -> None:
        self.running, self.most, self.may_end = 0, 0, asyncio.Event()

    async def read(self) -> int:
        self.running += 1
        self.most = max(self.most, self.running)
        await self.may_end.wait()
        self.running -= 1
        return 1


async def test_a_tenant_has_two_turns_and_a_bound_and_others_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "MAX_WAITING", 3)
    taken, readings, others = Turns(), Readings(), Readings()
    tasks = [asyncio.create_task(taken.take("ten_1", readings.read)) for _ in range(5)]
    await until(lambda: readings.running == 2)
    with pytest.raises(OverLimit) as caught:
        await taken.take("ten_1", readings.read)
    assert caught.value.error_code == "queue_full"
    others.may_end.set()
    assert await taken.take("ten_2", others.read) == 1
    readings.may_end.set()
    assert await asyncio.gather(*tasks) == [1] * 5
    assert readings.most == 2


async def test_one_that_left_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "MAX_WAITING", 1)
    taken, readings = Turns(), Readings()
    tasks = [asyncio.create_task(taken.take("ten_1", readings.read)) for _ in range(3)]
    await until(lambda: readings.running == 2)
    tasks[2].cancel()
    await asyncio.gather(tasks[2], return_exceptions=True)
    last = asyncio.create_task(taken.take("ten_1", readings.read))
    readings.may_end.set()
    assert await asyncio.gather(*tasks[:2], last) == [1] * 3


async def test_what_takes_too_long_is_an_error_and_keeps_its_turn_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "READ_S", 0.02)
    taken, readings = Turns(), Readings()
    for _ in range(4):
        with pytest.raises(Unavailable) as caught:
            await taken.take("ten_1", readings.read)
        assert caught.value.error_code == "database_unavailable"
    assert readings.most == 2
    readings.may_end.set()
    monkeypatch.setattr(turns, "READ_S", 10.0)
    assert await taken.take("ten_1", readings.read) == 1


async def test_an_error_of_a_reading_is_raised_and_its_turn_is_free() -> None:
    async def fails() -> None:
        raise InvalidRequest("no")

    taken = Turns()
    for _ in range(5):
        with pytest.raises(InvalidRequest, match="no"):
            await taken.take("ten_1", fails)


async def test_two_requests_of_a_tenant_are_expanded_at_a_time() -> None:
    readings = Readings()

    class Slow(NoState):
        async def context_of(self, tenant_id: str, *, previous_response_id: str | None, conversation_id: str | None) -> list[Item]:
            await readings.read()
            return []

    protocol = Responses(Slow())
    asked = [read_response({"model": "m", "input": "x", "previous_response_id": "resp_1"}) for _ in range(6)]
    tasks = [asyncio.create_task(protocol.expand("ten_1", request)) for request in asked]
    await until(lambda: readings.running == 2)
    readings.may_end.set()
    await asyncio.gather(*tasks)
    assert readings.most == 2


@pytest.mark.parametrize("field", ["conversation", "previous_response_id"])
async def test_a_context_of_too_many_parts_is_refused(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmaas.protocols.responses.protocol.MAX_CONTEXT_PARTS", 10)
    state = NoState()
    for parts in (9, 10):
        state.context = items.read_items("input", [{"role": "user", "content": ["a"] * parts}])
        request = read_response({"model": "m", "input": "x", field: "x_1"})
        if parts == 9:
            await Responses(state).expand("ten_1", request)
            assert len(request.parameters["messages"]) == 2
            continue
        with pytest.raises(InvalidRequest, match="at most 10") as caught:
            await Responses(state).expand("ten_1", request)
        assert (caught.value.error_code, caught.value.param) == ("context_too_large", field)


@pytest.mark.parametrize(
    "given",
    [
        [{"role": "user", "content": ["a"] * 100}],
        [{"role": "user", "content": "x"}, {"type": "reasoning", "summary": [""] * 100}],
        [{"role": "user", "content": "a"}] * 20,
        "a" * 2000,
    ],
)
def test_an_input_that_is_too_large_to_be_stored_is_refused(given: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "MAX_INPUT_BYTES", 2000)
    with pytest.raises(InvalidRequest, match="at most 2,000") as caught:
        read_response({"model": "m", "input": given})
    assert (caught.value.error_code, caught.value.param) == ("input_too_large", "input")
    assert read_response({"model": "m", "input": given, "store": False}).items
    assert read_response({"model": "m", "input": given}, may_store=False).items


def test_items_that_are_referred_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "MAX_INPUT_BYTES", 2000)
    request = read_response({"model": "m", "input": [{"type": "item_reference", "id": f"msg_{number}"} for number in range(3)]})
    known = items.read_items("input", "a" * 1000)[0]
    with pytest.raises(InvalidRequest, match="at most 2,000"):
        request.expand([], {f"msg_{number}": known for number in range(3)})
