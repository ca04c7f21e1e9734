"""One history with every transition of the table; the functions and their model agree after each call."""

from collections.abc import Iterator

import pytest
from msgspec.structs import replace
from redis import Redis

from lmaas.scheduling.client import Beat, Bounds
from lmaas.scheduling.states import TRANSITIONS, RetryReason, TicketState
from lmaas.states import Observed
from tests.integration.scheduling.build import ticket
from tests.integration.scheduling.model.data import Rules
from tests.integration.scheduling.side_by_side import Both, Direct, library_with

NOW = 1_800_000_000_000


@pytest.fixture
def both(valkey_url: str) -> Iterator[Both]:
    with Redis.from_url(valkey_url, decode_responses=True) as client:
        yield Both(client, Rules(), NOW, Direct(client, library_with(Rules())))


def test_every_transition_happens(both: Both) -> None:
    def beat(replica: str) -> None:
        both.heartbeat(replica, Beat("http://engine", 1, 1, Observed.READY, [], cleared=True))

    def submit(number: int, adapter: str = "") -> None:
        both.submit(ticket(number, adapter=adapter), Bounds(9, 9))

    def is_in(number: int, state: TicketState) -> None:
        assert both.renew([(f"r{number}", None)])["tickets"][0]["state"] == state

    beat("x")
    submit(1)
    is_in(1, TicketState.GRANTED)
    both.retry(ticket(1), "x", RetryReason.ENGINE, 0)
    is_in(1, TicketState.QUEUED)
    beat("x")
    both.deregister("x")
    is_in(1, TicketState.REVOKED)
    both.retry(ticket(1), "", RetryReason.ENGINE, 1)
    is_in(1, TicketState.FAILED)
    both.release(ticket(1), None, None, None)
    beat("y")
    submit(2)
    both.deregister("y")
    both.retry(ticket(2), "", RetryReason.ENGINE, 0)
    is_in(2, TicketState.QUEUED)
    beat("z")
    is_in(2, TicketState.GRANTED)
    both.retry(ticket(2), "z", RetryReason.ENGINE, 1)
    is_in(2, TicketState.FAILED)
    both.release(ticket(2), None, None, None)
    beat("z")
    submit(3, "A")
    is_in(3, TicketState.LOADING)
    both.drain("z")
    is_in(3, TicketState.QUEUED)
    beat("w")
    both.load_failed("w", "A")
    is_in(3, TicketState.LOAD_FAILED)
    both.release(ticket(3), None, None, None)
    submit(4, "B")
    both.loaded("w", "B")
    is_in(4, TicketState.GRANTED)
    both.release(ticket(4), None, None, None)
    # A background ticket takes the last adapter slot only if interactive work is not recent, and gives it back.
    for number, (adapter, state), (other, other_state) in (
        (5, ("B", TicketState.GRANTED), ("C", TicketState.LOADING)),
        (7, ("D", TicketState.LOADING), ("B", TicketState.GRANTED)),
    ):
        both.at(both.now + 61_000)
        both.heartbeat("w", Beat("http://engine", 1, 1, Observed.READY, []))
        both.submit(replace(ticket(number, adapter=adapter), background=True), Bounds(9, 9))
        is_in(number, state)
        submit(number + 1, other)
        is_in(number, TicketState.YIELDED)
        is_in(number + 1, other_state)
        for each in (number, number + 1):
            both.release(ticket(each), None, None, None)
    assert set(both.model.moves) == {(state, target) for state, targets in TRANSITIONS.items() for target in targets}
