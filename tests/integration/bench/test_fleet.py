"""A fleet of replicas without engines: its requests run, its full queue moves, and a dead replica comes back."""

from pathlib import Path

from bench.fleet import fleets
from bench.fleet.names import Sizes

#: A small fleet with fewer slots than adapters that a replica may run.
SIZES = Sizes(6, 8, pools=2, running=6, slots=6, waiting=6)


async def test_a_fleet_runs_and_loses_a_replica(tmp_path: Path) -> None:
    async with fleets(tmp_path / "valkey", fleet=SIZES) as made:
        fleet = made["fleet"]
        assert await fleet.heartbeats(0.05) > 0
        assert await fleet.with_room(0.05) > 0
        async with fleet.full() as full:
            assert await full(0.05) > 0
        assert await fleet.lose_replica() > 0
        assert await fleet.with_room(0.05) > 0
