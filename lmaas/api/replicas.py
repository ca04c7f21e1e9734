"""Handlers for replicas."""

from typing import Any

import msgspec

from lmaas.api.context import Api, ApiCall
from lmaas.api.operation import page_of
from lmaas.api.shapes.common import Page
from lmaas.api.shapes.models import Replica, ReplicaQuery, Start, StoppingReplica
from lmaas.errors import NotFound
from lmaas.states import Desired, Observed
from lmaas.store import replicas as rows
from lmaas.store.paging import Part
from lmaas.store.scopes import OPERATOR


def shown_replica(row: rows.Replica, names: dict[str, str]) -> Replica:
    """Return a replica as the API shows it."""
    return Replica(
        id=row.id,
        base_model=names[row.base_model_id],
        desired=Desired(row.desired),
        observed=Observed(row.observed),
        url=row.url,
        reason=row.reason,
        created_at=row.created_at,
        ready_at=row.ready_at,
        ended_at=row.ended_at,
        start=_shown_start(row.start),
    )


def _shown_start(record: Any) -> Start | None:
    # A supervisor of another release may have written other phases, or something else altogether.
    if not isinstance(record, dict):
        return None
    try:
        return msgspec.convert({name: record[name] for name in Start.__struct_fields__ if name in record}, Start)
    except msgspec.ValidationError:
        return None


async def list_replicas(api: Api, call: ApiCall[None, ReplicaQuery]) -> Page[Replica]:
    """Return a page of the replicas, newest first; with `ended` also those that have ended."""
    query = call.query
    found = await rows.list_replicas(api.db, ended=query.ended, part=Part(query.limit, query.after))
    # After the replicas: the base model of the newest may have been created just before it.
    names = await rows.model_names(api.db)
    return page_of([shown_replica(row, names) for row in found], [row.id for row in found], query.limit)


async def get_replica(api: Api, call: ApiCall[None, None]) -> Replica:
    """Return one replica, also one that has ended."""
    row = await rows.get_replica(api.db, call.path["replica"])
    if row is None:
        raise NotFound("The replica does not exist.", code="replica_not_found")
    return shown_replica(row, await rows.model_names(api.db))


async def stop_replica(api: Api, call: ApiCall[None, None]) -> StoppingReplica:
    """Drain a replica and stop it. If there is demand, the controller starts another."""
    replica_id = call.path["replica"]
    if not await rows.desire_stop(api.db, replica_id, OPERATOR, audit=call.audit):
        raise NotFound("The replica does not exist, or has ended.", code="replica_not_found")
    return StoppingReplica(id=replica_id, desired="stopped")
