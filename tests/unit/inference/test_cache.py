"""Short-lived cached reads, which are used for longer while the database is away."""

import asyncio

import pytest

from lmaas.errors import Unavailable
from lmaas.inference import cache as module
from lmaas.inference.cache import Changes, ReadCache
from tests.support.conditions import until


class Source:
    """A database that can be away, and a clock."""

    def __init__(self, **answers: str) -> None:
        self.answers: dict[str, str] = dict(answers)
        self.asked: list[str] = []
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.now = 1000.0
        self.number = 1
        self.changes = Changes(self.ask_number, clock=lambda: self.now)

    async def ask_number(self) -> int:
        if self.error is not None:
            raise self.error
        return self.number

    async def ask(self, key: str) -> str | None:
        self.asked.append(key)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return self.answers.get(key)

    def cache(self, size: int = 10, *, changes: bool = False) -> ReadCache[str, str]:
        return ReadCache[str, str](
            self.ask, fresh_s=1, grace_s=60, size=size, changes=self.changes if changes else None, clock=lambda: self.now
        )


@pytest.mark.parametrize(
    ("later_s", "away", "asked", "answer"),
    [
        (0.9, False, 1, "old"),
        (0.9, True, 1, "old"),
        (1.0, False, 2, "new"),
        (1.0, True, 2, "old"),
        (59.9, True, 2, "old"),
        (60.0, True, 2, None),
        (1e9, False, 2, "new"),
    ],
)
async def test_fresh_then_asked_again_then_grace(later_s: float, away: bool, asked: int, answer: str | None) -> None:
    source = Source(k="old")
    cache = source.cache()
    assert await cache.get("k") == "old"
    source.now += later_s
    source.answers["k"] = "new"
    source.error = Unavailable("away") if away else None
    if answer is None:
        with pytest.raises(Unavailable):
            await cache.get("k")
    else:
        assert await cache.get("k") == answer
    assert len(source.asked) == asked


async def test_an_unknown_key_is_not_unknown_but_unavailable() -> None:
    source = Source()
    source.error = Unavailable("away")
    with pytest.raises(Unavailable):
        await source.cache().get("k")


async def test_none_is_not_kept_and_ends_what_was_known() -> None:
    source = Source(k="v")
    cache = source.cache()
    assert await cache.get("x") is None
    source.answers["x"] = "new"
    assert await cache.get("x") == "new"
    await cache.get("k")
    source.now += 2
    del source.answers["k"]
    assert await cache.get("k") is None
    source.error = Unavailable("away")
    with pytest.raises(Unavailable):  # no grace for entries that are known to be gone
        await cache.get("k")


async def test_other_errors_are_not_excused() -> None:
    source = Source(k="v")
    cache = source.cache()
    await cache.get("k")
    source.now += 2
    source.error = ValueError("a mistake")
    with pytest.raises(ValueError, match="a mistake"):
        await cache.get("k")


async def test_one_question_at_a_time_for_each_key() -> None:
    source = Source(k="v", other="w")
    source.gate = asyncio.Event()
    cache = source.cache()
    waiting = [asyncio.create_task(cache.get(key)) for key in ("k", "k", "other", "k")]
    await asyncio.sleep(0)
    waiting[0].cancel()  # the first caller is cancelled: the others still get the value
    await asyncio.sleep(0)
    source.gate.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert results[1:] == ["v", "w", "v"]
    assert isinstance(results[0], asyncio.CancelledError)
    assert sorted(source.asked) == ["k", "other"]
    assert await cache.get("k") == "v"
    assert sorted(source.asked) == ["k", "other"]


async def test_everybody_hears_of_the_same_failure_and_the_next_asks_again() -> None:
    source = Source(k="v")
    source.gate = asyncio.Event()
    source.error = Unavailable("away")
    cache = source.cache()
    waiting = [asyncio.create_task(cache.get("k")) for _ in range(3)]
    await asyncio.sleep(0)
    source.gate.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable] * 3
    assert len(source.asked) == 1
    source.error = None
    assert await cache.get("k") == "v"


async def test_the_longest_unused_go_first() -> None:
    source = Source(a="1", b="2", c="3")
    cache = source.cache(size=2)
    for key in ("a", "b", "a", "c"):
        await cache.get(key)
    await cache.get("a")
    await cache.get("c")
    assert source.asked == ["a", "b", "c"]
    await cache.get("b")
    assert source.asked == ["a", "b", "c", "b"]


async def test_what_was_answered_long_ago_is_as_old_as_its_question() -> None:
    source = Source(k="v")
    source.gate = asyncio.Event()
    cache = source.cache()
    waiting = asyncio.create_task(cache.get("k"))
    await until(lambda: source.asked == ["k"], every_s=0)
    source.now += 5
    source.gate.set()
    await waiting
    await cache.get("k")
    assert len(source.asked) == 2


async def test_a_database_that_hangs_is_away_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KNOWN_WAIT_S", 0.02)
    monkeypatch.setattr(module, "UNKNOWN_WAIT_S", 0.05)
    source = Source(k="v")
    cache = source.cache()
    await cache.get("k")
    source.now += 2
    source.gate = asyncio.Event()
    async with asyncio.timeout(60):
        assert await cache.get("k") == "v"
        with pytest.raises(Unavailable):
            await cache.get("unknown")
    source.gate.set()
    await until(lambda: not cache.pending, every_s=0.01)


async def test_for_a_database_that_hangs_known_keys_wait_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(k="v", l="w")
    cache = source.cache()
    assert [await cache.get(key) for key in "kl"] == ["v", "w"]
    source.now += 2
    gate = source.gate = asyncio.Event()
    try:
        monkeypatch.setattr(module, "KNOWN_WAIT_S", 0.02)
        monkeypatch.setattr(module, "UNKNOWN_WAIT_S", 0.05)
        assert await cache.get("k") == "v"
        await until(lambda: not cache.pending, every_s=0.01)
        monkeypatch.setattr(module, "KNOWN_WAIT_S", 15.0)
        source.now += 15
        async with asyncio.timeout(10):  # read again in the background, without waiting
            assert [await cache.get("k"), await cache.get("l")] == ["v", "w"]
        assert source.asked == ["k", "l", "k", "k", "l"]
        source.now += 60  # too old to use without the database
        with pytest.raises(Unavailable):
            await cache.get("k")
    finally:
        gate.set()


async def test_after_an_outage_the_truth_is_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(k="v", l="w")
    cache = source.cache()
    assert [await cache.get(key) for key in "kl"] == ["v", "w"]
    source.now += 2
    source.error = Unavailable("away")
    assert await cache.get("k") == "v"
    source.now += 2
    # One read shows that the database is back; so does the time without any read.
    source.error, source.answers = None, {"k": "new", "l": "new"}
    await cache.get("k")
    await until(lambda: not cache.pending, every_s=0.01)
    assert [await cache.get("k"), await cache.get("l")] == ["new", "new"]
    source.now += 2
    source.error = Unavailable("away")
    assert await cache.get("k") == "new"
    source.now += module.SILENT_S + 1
    source.error, source.answers = None, {"k": "newer", "l": "newer"}
    assert await cache.get("k") == "newer"


async def test_what_changed_after_an_outage_is_waited_for() -> None:
    source = Source(k="v")
    cache = source.cache(changes=True)
    await source.changes.look()
    await cache.get("k")
    source.now += 2
    source.error = Unavailable("away")
    assert await cache.get("k") == "v"
    source.now += 2
    source.error = None
    await source.changes.look()  # it is back, and nothing has changed: the key need not be read again
    assert await cache.get("k") == "v"
    source.now += 2
    source.answers, source.number = {}, 2  # the key is revoked
    await source.changes.look()
    assert await cache.get("k") is None


async def test_a_question_that_is_never_answered_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KNOWN_WAIT_S", 0.02)
    monkeypatch.setattr(module, "UNKNOWN_WAIT_S", 0.05)
    source = Source(k="v")
    source.gate = gate = asyncio.Event()
    cache = source.cache()
    with pytest.raises(Unavailable):
        await cache.get("k")
    source.gate = None  # the database is back, but that one connection is dead
    try:
        await asyncio.sleep(0.05)
        assert await cache.get("k") == "v"
    finally:
        gate.set()


async def test_while_nothing_changes_nobody_asks_again() -> None:
    source = Source(k="v")
    cache = source.cache(changes=True)
    await source.changes.look()
    for _ in range(100):
        source.now += 0.9
        await source.changes.look()
        assert await cache.get("k") == "v"
    assert len(source.asked) == 1
    source.now += module.RECHECK_S
    await source.changes.look()
    await cache.get("k")
    assert len(source.asked) == 2


async def test_after_a_change_everything_is_asked_again() -> None:
    source = Source(k="old", other="same")
    cache = source.cache(changes=True)
    await source.changes.look()
    assert [await cache.get(key) for key in ("k", "other")] == ["old", "same"]
    source.now += 0.9
    source.answers["k"], source.number = "new", 2
    assert await cache.get("k") == "old"  # as without the number
    source.now += 0.1
    await source.changes.look()
    assert [await cache.get(key) for key in ("k", "other")] == ["new", "same"]
    assert len(source.asked) == 4
    source.now += 0.9
    await source.changes.look()
    assert await cache.get("k") == "new"
    assert len(source.asked) == 4


@pytest.mark.parametrize("looked", [False, True])
async def test_when_nobody_knows_of_changes_answers_age(looked: bool) -> None:
    source = Source(k="old")
    cache = source.cache(changes=True)
    if looked:
        await source.changes.look()
    await cache.get("k")
    source.answers["k"] = "new"
    source.now += 1.0
    assert await cache.get("k") == "new"
    assert len(source.asked) == 2


async def test_grace_begins_when_the_database_was_last_heard() -> None:
    source = Source(k="v")
    cache = source.cache(changes=True)
    await source.changes.look()
    await cache.get("k")
    source.now += 100
    await source.changes.look()
    source.error = Unavailable("away")
    source.now += 59.9
    await source.changes.look()
    assert await cache.get("k") == "v"
    source.now += 0.2
    with pytest.raises(Unavailable):
        await cache.get("k")


async def test_what_was_asked_while_a_change_was_made_is_asked_again() -> None:
    source = Source(k="old")
    cache = source.cache(changes=True)
    await source.changes.look()
    source.gate = asyncio.Event()
    waiting = asyncio.create_task(cache.get("k"))
    await until(lambda: source.asked == ["k"], every_s=0)
    source.now += 0.1
    source.number = 2
    await source.changes.look()  # the value that is being read may be older
    source.gate.set()
    assert await waiting == "old"
    source.answers["k"] = "new"
    source.now += 0.95
    await source.changes.look()
    assert await cache.get("k") == "new"
