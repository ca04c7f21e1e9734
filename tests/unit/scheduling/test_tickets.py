"""The parts of a ticket that a client sends."""

import msgspec

from lmaas.scheduling.client import NO_BOUNDS, LimitedScope, Ticket


def test_the_last_byte_of_a_ticket_differs_from_that_of_most_others() -> None:
    """Lua's hash of a long text covers its last character and few others; texts with the same hash are compared one by one."""
    sent = [Ticket(f"r{number}", "p", "a", "g", "", "", 1, "{}").sent() for number in range(200)]
    assert len({each[-1] for each in sent}) > 30


def test_a_ticket_is_an_array_of_two_bytes_of_length_and_its_terms_of_none() -> None:
    """The library steps over these heads (SENT_AT in layout.lua, `terms_of` in scheduler.lua)."""
    scopes = (LimitedScope("t", "tenant", 1, None, 3), LimitedScope("k", "key"))
    one = Ticket("r1", "p", "a", "g", "", "", 1, '{"x": 1}', limits=scopes)
    assert one.sent()[:3] == bytes((0xDC, 0, 17))
    assert msgspec.msgpack.decode(one.sent())[15] == '{"x": 1}'
    terms = one.terms(5, 1, NO_BOUNDS)
    assert terms[0] == 0x95
    assert msgspec.msgpack.decode(terms) == [5, 1, 0, 0, [["t", "tenant", 1, None, 3, None, None], ["k", "key", *[None] * 5]]]
