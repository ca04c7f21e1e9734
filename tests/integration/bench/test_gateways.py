"""The relay that counts the commands a gateway sends to Valkey."""

from pathlib import Path

from redis.asyncio import Redis

from bench.gateways.counted import counted


async def test_a_relay_counts_what_goes_through(valkey_url: str, tmp_path: Path) -> None:
    async with counted(tmp_path / "relay.sock", Path(valkey_url.removeprefix("unix://"))) as counts:
        async with Redis(unix_socket_path=str(tmp_path / "relay.sock"), decode_responses=True) as redis:
            await redis.set("bench", "x" * 100_000)
            async with redis.pipeline(transaction=False) as pipeline:
                for _ in range(3):
                    pipeline.get("bench")
                assert await pipeline.execute() == ["x" * 100_000] * 3
        assert (counts["SET"], counts["GET"]) == (1, 3)
