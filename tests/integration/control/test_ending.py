"""The end of all replicas where their machine is taken away."""

import asyncio

from lmaas.control.ending import end_replicas
from lmaas.states import Desired, Observed
from lmaas.store.database import Database
from lmaas.store.models import BaseModel, put_base_model
from lmaas.store.replicas import add_replica, get_replica


class Machine:
    """A provisioner whose replicas end when they are asked twice whether they still run, unless they are deaf."""

    def __init__(self, *replicas: str, deaf: bool = False) -> None:
        self.replicas, self.deaf = dict.fromkeys(replicas, "mod"), deaf
        self.asked = 0
        self.killed: list[str] = []

    async def list(self) -> dict[str, str]:
        """Those that run."""
        self.asked += 1
        if self.asked > 2 and not self.deaf:
            self.replicas.clear()
        return dict(self.replicas)

    async def kill(self, replica_id: str) -> None:
        """It is gone."""
        self.killed.append(replica_id)
        del self.replicas[replica_id]


async def a_replica(db: Database, replica_id: str) -> None:
    values = {"source": "/m", "dtype": "float32", "linears": {}, "max_lora_rank": 8, "max_loras": 2, "max_cpu_loras": 2}
    values |= {"max_num_seqs": 4, "max_model_len": 64, "kv_cache_bytes": 1, "engine_args": ""}
    model = await put_base_model(db, BaseModel(id="", name="tiny", **values))  # type: ignore[arg-type]
    await add_replica(db, replica_id, model.id)


async def test_they_drain(db: Database) -> None:
    await a_replica(db, "rep_mine")
    await a_replica(db, "rep_elsewhere")
    machine = Machine("rep_mine")
    await end_replicas(db, machine, 60)  # type: ignore[arg-type]
    mine, elsewhere = await get_replica(db, "rep_mine"), await get_replica(db, "rep_elsewhere")
    assert mine is not None
    assert elsewhere is not None
    assert (mine.desired, elsewhere.desired) == (Desired.STOPPED, Desired.RUNNING), "another machine's go on"
    assert mine.observed == Observed.STARTING, "their supervisors tell how they end"
    assert machine.killed == []


async def test_what_does_not_end_is_killed(db: Database) -> None:
    machine = Machine("rep_1", "rep_2", deaf=True)
    await end_replicas(db, machine, 0.01)  # type: ignore[arg-type]
    assert sorted(machine.killed) == ["rep_1", "rep_2"]


async def test_hurry(db: Database) -> None:
    hurry = asyncio.Event()
    hurry.set()
    machine = Machine("rep_1", deaf=True)
    await end_replicas(db, machine, 3600, hurry)  # type: ignore[arg-type]
    assert machine.killed == ["rep_1"]


async def test_without_a_database() -> None:
    away = Database("postgresql://nobody@127.0.0.1:1/none")
    machine = Machine("rep_1", deaf=True)
    await end_replicas(away, machine, 0.01)  # type: ignore[arg-type]
    assert machine.killed == ["rep_1"]
    await away.close()
