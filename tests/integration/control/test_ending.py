"""Replicas of a machine that shuts down are drained."""

from lmaas.control.ending import end_replicas
from lmaas.states import Desired, Observed
from lmaas.store.database import Database
from lmaas.store.models import BaseModel, put_base_model
from lmaas.store.replicas import add_replica, get_replica
from tests.support.machine import Machine


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
    assert (mine.desired, elsewhere.desired) == (Desired.STOPPED, Desired.RUNNING), "replicas of another machine continue"
    assert mine.observed == Observed.STARTING, "supervisors report their own ends"
    assert machine.killed == []
