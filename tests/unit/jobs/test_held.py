"""The room for lines in a runner's memory."""

import asyncio
from datetime import UTC, datetime

from lmaas.jobs.held import HeldLine, HeldLines
from lmaas.metering.usage import CANCELLED
from lmaas.store.line_leases import LARGE_BYTES, SUSPECT_LOSSES, LeasedLine, Offer

#: A large line.
LARGE = LARGE_BYTES + 1


def make(held: HeldLines, tenant: str, position: int, size: int = LARGE, pool: str = "p", losses: int = 0) -> HeldLine:
    offer = Offer(tenant, f"batch_{tenant}", pool, 9, "key", "/v1/chat/completions", "file", datetime.now(UTC), 9_000)
    line = HeldLine(LeasedLine(tenant, f"batch_{tenant}", position, losses + 1, 0, 0, size), offer)
    held.add(line)
    return line


def test_large_lines_have_a_bound_in_bytes() -> None:
    held = HeldLines(3 * LARGE, 0)
    lines = [make(held, "a", number) for number in range(4)]
    assert held.large_bytes == 3 * LARGE
    assert [held.has_room(line) for line in lines] == [True, True, True, False]
    assert held.large_bytes == 1
    held.forget_text(lines[0])
    held.forget_text(lines[0])
    assert held.has_room(lines[3])
    assert not held.has_room(lines[0])


def test_a_line_alone_has_room() -> None:
    held = HeldLines(10, 0)
    one, two = make(held, "a", 0), make(held, "b", 1)
    assert held.has_room(one)
    assert not held.has_room(two)
    held.forget_text(one)
    assert held.has_room(two)


def test_the_large_lines_of_one_tenant_leave_room_for_others() -> None:
    held = HeldLines(2 * LARGE, 2 * LARGE)
    assert [held.has_room(make(held, "a", number)) for number in range(3)] == [True, True, False]
    assert held.has_room(make(held, "b", 0))
    assert not held.has_room(make(held, "b", 1)), "only the first one fits"
    assert held.has_room(make(held, "a", 9, pool="another")), "another pool of the same tenant"
    assert not held.has_room(make(held, "c", 0)), "this limit applies, too"
    assert all(held.has_room(make(held, "d", number, LARGE_BYTES)) for number in range(100)), "small ones always fit"


def test_lines_without_room_do_not_count_as_waiting_for_an_engine() -> None:
    held = HeldLines()
    line = make(held, "a", 0)
    make(held, "b", 1)
    line.without_room = True
    assert held.without_room("p") == {"a"}
    assert held.without_room("another") == set()
    assert held.counted()["p"][:2] == (2, 1)
    assert held.has_room(line)
    assert held.without_room("p") == set()
    assert held.counted()["p"][:2] == (2, 2)


async def test_a_line_that_waits_for_room_gets_it_or_leaves() -> None:
    held = HeldLines(LARGE, 0)
    first, second, third = [make(held, "a", number) for number in range(3)]
    assert await held.room_for(first)
    waits = [asyncio.create_task(held.room_for(line)) for line in (second, third)]
    third.leave(CANCELLED)
    assert await asyncio.wait_for(waits[1], 5) is False
    held.forget_text(first)
    assert await asyncio.wait_for(waits[0], 5) is True


def test_lines_with_which_runners_were_lost_are_counted() -> None:
    held = HeldLines()
    for number in range(4):
        make(held, "a", number, losses=SUSPECT_LOSSES - 1 + number % 2)
    assert held.suspects == 2
