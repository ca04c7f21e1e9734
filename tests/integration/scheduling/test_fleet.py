"""Many replicas and many tickets: the work of one call is bounded, and unfinished work does not distort what other calls read."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
from msgspec.structs import replace
from redis import Redis

from lmaas.scheduling.client import Beat, Bounds
from lmaas.scheduling.states import RetryReason
from lmaas.states import Observed
from tests.integration.scheduling.build import ticket
from tests.integration.scheduling.model.data import Rules
from tests.integration.scheduling.side_by_side import Both, Direct, answer, library_with

NOW = 1_800_000_000_000
BOUNDS = Bounds(10_000, 10_000)
PORTION = Rules.MAX_REAPED


@pytest.fixture
def both(valkey_url: str) -> Iterator[Both]:
    with Redis.from_url(valkey_url, decode_responses=True) as client:
        yield Both(client, Rules(), NOW, Direct(client, library_with(Rules())))


def beat(both: Both, name: str, slots: int = 2, adapter_slots: int = 2, resident: tuple[str, ...] = (), state: str = "ready") -> None:
    both.heartbeat(name, Beat(f"http://{name}", slots, adapter_slots, Observed(state), list(resident)))


def submit(both: Both, number: int, adapter: str = "", tenant: str = "a") -> str:
    """Submit a ticket and return its replica, or its state if it has none."""
    reply = both.submit(ticket(number, tenant, adapter), BOUNDS)
    return str(reply.get("replica", reply["state"]))


def revoked(both: Both) -> list[str]:
    return [news["id"] for channel, news in both.model.said if channel == "lmaas:gateway:g" and news["event"] == "revoked"]


def test_the_tickets_of_a_lost_replica_are_taken_back_in_portions(both: Both) -> None:
    count = 2 * PORTION + 10
    beat(both, "x", slots=1000)
    for number in range(count):
        submit(both, number)
    both.deregister("x")
    assert revoked(both) == [f"r{number}" for number in range(PORTION)], "the tickets that came first"
    both.stats()
    assert revoked(both) == [f"r{number}" for number in range(PORTION, 2 * PORTION)]
    both.stats()
    assert len(revoked(both)) == 10
    both.stats()
    assert revoked(both) == []


def test_a_ticket_that_no_call_has_reached_yet_reads_as_revoked(both: Both) -> None:
    last = 3 * PORTION + 10
    beat(both, "x", slots=1000, resident=("A",))
    for number in range(last + 1):
        submit(both, number, "A" if number % 2 else "")
    both.deregister("x")
    assert both.renew([(f"r{last}", (5, 0, 7))])["tickets"] == [{"state": "revoked", "attempts": 0}]
    assert both.retry(ticket(last - 1, adapter="A"), "x", RetryReason.ENGINE, 0)["state"] == "queued"
    assert both.submit(ticket(last - 2), BOUNDS)["state"] == "revoked"
    assert both.release(ticket(last - 3, adapter="A"), None, 100, (5, 0, 7))
    # A new replica of the same name holds none of the lost tickets.
    beat(both, "x", slots=1000, resident=("A",))
    assert both.stats()["replicas"]["x"]["load"] == 1, "the ticket that came back"
    assert both.evict("x", "A") is False
    both.release(ticket(last - 1, adapter="A"), None, 100, (5, 0, 7))
    assert both.evict("x", "A") is True


def test_tickets_whose_adapter_was_loading_wait_again_in_the_order_in_which_they_came(both: Both) -> None:
    count = PORTION + 6
    beat(both, "x", slots=1000, adapter_slots=4)
    for number in range(count):
        assert submit(both, number, "AB"[number % 2]) == "loading"
    assert both.drain("x") == 6, "the tickets that no call has reached yet"
    assert both.heartbeat("x", Beat("http://x", 1000, 4, Observed.READY, []))["loads"] == {}
    assert [each.ticket.id for each in both.model.queue()] == [f"r{number}" for number in range(count)]


def test_many_replicas_that_fall_silent_at_once_get_nothing(both: Both) -> None:
    for number in range(40):
        beat(both, f"x{number:02}")
    both.at(both.now + Rules.STALE_MS)
    assert submit(both, 1) == "queued"
    beat(both, "x30")
    assert both.renew([("r1", None)])["tickets"][0]["replica"] == "x30"


def test_many_replicas_that_are_gone_are_removed_in_portions(both: Both) -> None:
    for number in range(40):
        beat(both, f"x{number:02}")
    both.at(both.now + Rules.GONE_MS)
    left = []
    for _ in range(20):
        both.at(both.now + 1000)
        left.append(len(both.stats()["replicas"]))
    assert left[-1] == 0
    assert all(before - after <= Rules.MAX_GONE for before, after in pairwise(left))


def test_the_least_loaded_of_many_replicas_with_the_adapter_is_found(both: Both) -> None:
    for number in range(40):
        beat(both, f"x{number:02}", slots=2, resident=("A",) if number % 2 else ())
    taken = [submit(both, number, "A", f"t{number}") for number in range(20)]
    assert taken == ["x01", "x01"] + [name for number in range(3, 21, 2) for name in [f"x{number:02}"] * 2], "where it runs comes first"
    assert submit(both, 100) == "x00"


def test_an_adapter_on_more_replicas_than_are_considered_runs_where_it_is_resident(both: Both) -> None:
    """The replicas with the first names are full, and the least loaded ones do not have the adapter."""
    names = [f"x{number:02}" for number in range(2 * Rules.MAX_CANDIDATES)]
    for name in names:
        beat(both, name, slots=1, resident=("A",))
    for number in range(len(names) - 1):
        assert submit(both, number, "A") != "loading"
    assert submit(both, 100, "A") == names[-1]
    assert submit(both, 101, "A") == "queued"


def test_the_oldest_of_many_starts_tells_how_long_a_ticket_waits(both: Both) -> None:
    for number in range(20):
        beat(both, f"x{number:02}", state="starting")
        both.at(both.now + 100)
    assert both.submit(ticket(1), BOUNDS)["wait_ms"] == Rules.START_MS - 2000


def say_again(both: Both, beat: Beat) -> tuple[dict[str, int], dict[str, object]]:
    """Send a heartbeat, and return how often it called each command of the server, with the reply."""
    scheduler = both.scheduler
    scheduler.reads, reads = lambda _: None, scheduler.reads
    both.client.config_resetstat()
    reply = answer(scheduler.heartbeat("p", "x", beat))
    called = {name.removeprefix("cmdstat_"): each["calls"] for name, each in both.client.info("commandstats").items()}
    scheduler.reads = reads
    both.heartbeat("x", beat)  # the model does the same
    return called, reply


SAME = Beat("http://x", 2, 2, Observed.READY, ["A"])


def test_a_heartbeat_that_changes_nothing_writes_only_its_time(both: Both) -> None:
    for _ in range(2):
        both.heartbeat("x", SAME)
    called, reply = say_again(both, SAME)
    assert called.pop("fcall") == 1
    assert {name: count for name, count in called.items() if name in ("hset", "zadd")} == {"hset": 1, "zadd": 1}
    assert sum(called.values()) <= 8
    assert reply["load"] == 0
    assert submit(both, 1, "A") == "x"
    assert say_again(both, SAME)[1]["load"] == 1


@pytest.mark.parametrize(
    "what", ["another URL", "suspect", "drains", "silent", "loads", "a ticket waits", "a lease expired", "starts", "gone"]
)
def test_a_heartbeat_that_says_the_same_again_does_what_has_to_be_done(both: Both, what: str) -> None:
    same = SAME if what != "starts" else Beat("http://x", 2, 2, Observed.STARTING, [], left_ms=5000)
    for _ in range(2):
        both.heartbeat("x", same)
    match what:
        case "another URL":
            both.heartbeat("x", Beat("http://y", 2, 2, Observed.READY, ["A"]))
            assert submit(both, 1) == "x"
            assert both.renew([("r1", None)])["tickets"][0]["url"] == "http://y"
        case "suspect":
            submit(both, 1)
            both.retry(ticket(1), "x", RetryReason.ENGINE, 0)
            assert both.heartbeat("x", same)["suspect"]
        case "drains":
            both.drain("x")
            assert both.heartbeat("x", same)["state"] == "draining"
        case "silent":
            both.at(both.now + Rules.STALE_MS)
            assert submit(both, 1) == "queued"
            both.heartbeat("x", same)
            assert both.renew([("r1", None)])["tickets"][0]["replica"] == "x"
        case "loads":
            assert submit(both, 1, "B") == "loading"
            reply = both.heartbeat("x", same)
            assert (list(reply["loads"]), reply["running"]) == (["B"], {"B": 1})
        case "a ticket waits":
            assert [submit(both, number) for number in range(3)] == ["x", "x", "queued"]
            assert both.heartbeat("x", same)["load"] == 2
        case "a lease expired":
            both.submit(replace(ticket(1), event='{"request_id": "r1"}'), BOUNDS)
            for _ in range(Rules.LEASE_MS // 1000 + 1):
                both.at(both.now + 1000)
                reply = both.heartbeat("x", same)
            assert reply["load"] == 0
        case "starts":
            submit(both, 1, "A")
            assert list(both.heartbeat("x", same)["warm"]) == ["A"]
        case "gone":
            both.deregister("x")
            assert both.heartbeat("x", same)["load"] == 0
    for _ in range(3):
        both.at(both.now + 1000)
        both.heartbeat("x", same)
    assert both.stats()["replicas"]["x"]["beat_ms"] == 0
