"""What a supervisor writes down, also when it could not at once."""

from pathlib import Path
from typing import Any

import pytest

from lmaas.errors import Unavailable
from lmaas.replica import supervisor
from lmaas.states import Observed
from lmaas.store.database import Database
from lmaas.store.replicas import list_replicas, observe
from tests.gateway.stack import running


async def test_ready_is_written_once_postgres_is_back(
    postgres_url: str, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[Observed] = []

    async def away_once(db: Database, replica_id: str, state: Observed, **facts: Any) -> bool:
        if not refused:
            refused.append(state)
            raise Unavailable("Postgres is away")
        return await observe(db, replica_id, state, **facts)

    monkeypatch.setattr(supervisor, "observe", away_once)
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        model = await stack.model("base")
        await stack.replica(model)
        assert refused == [Observed.READY]
        (row,) = await list_replicas(stack.db, base_model_id=model.id)
        assert (row.observed, row.url is not None, row.ready_at is not None) == (Observed.READY, True, True)
