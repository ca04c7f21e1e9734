"""Base models: the shared weights, one pool of replicas each."""

from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Row, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from lmaas.audit import Audit
from lmaas.errors import Conflict, InvalidRequest, NotFound
from lmaas.states import TERMINAL, PoolKind
from lmaas.store.audit import record
from lmaas.store.database import Database, new_id
from lmaas.store.paging import Part, rows_of
from lmaas.store.scopes import OPERATOR, SYSTEM
from lmaas.store.tables import adapters, base_models, replicas
from lmaas.types import AUTO, BaseModelShapes

#: Of the dtypes that engines compute in.
NARROWEST = "float16"


@dataclass(frozen=True, slots=True)
class BaseModel:
    """Shared weights and how their engines are run. Its `id` is also the id of its pool."""

    id: str
    name: str
    #: A folder or a hub id.
    source: str
    dtype: str
    linears: dict[str, list[int]]
    max_lora_rank: int
    #: Different adapters that an engine runs at the same time.
    max_loras: int
    #: Adapters resident on an engine.
    max_cpu_loras: int
    #: Sequences that an engine runs at once: a replica's slots.
    max_num_seqs: int
    max_model_len: int
    kv_cache_bytes: int
    engine_args: str
    #: The work of its engines. It never changes.
    kind: PoolKind = PoolKind.GENERATE
    #: An operator's own bounds; None means the setting's.
    min_replicas: int | None = None
    max_replicas: int | None = None
    idle_timeout_s: float | None = None
    #: The part of its machine that a replica takes; None means the setting's.
    cpus: float | None = None
    accelerators: int | None = None
    #: The tenants' prices: micro-dollars per million tokens.
    prompt_price: int = 0
    cached_price: int = 0
    completion_price: int = 0
    #: The cost of an engine: micro-dollars per hour.
    engine_price: int = 0
    #: Set by the database; None for one that is not stored yet.
    created_at: datetime | None = field(default=None, compare=False)

    @property
    def takes_adapters(self) -> bool:
        """True if its engines apply LoRA adapters. Of models that embed text, only those do whose adaptable modules are known."""
        return self.kind is PoolKind.GENERATE or bool(self.linears)

    @property
    def shapes(self) -> BaseModelShapes:
        """The properties that an adapter must fit."""
        # Decided where an engine starts: whatever that will be, what is finite in the narrowest is finite in it.
        dtype = NARROWEST if self.dtype == AUTO else self.dtype
        return BaseModelShapes({name: (out, into) for name, (out, into) in self.linears.items()}, dtype, self.max_lora_rank)


class ChangedMeanwhile(Exception):
    """A base model is no longer what a decision was made on. Read it again, and decide again."""


_IS_THERE = base_models.c.deleted_at.is_(None)
#: The first half of the keys of the locks on names.
_NAME_LOCK = 0x6C6D6E61
_COLUMNS = [base_models.c[name] for name in BaseModel.__slots__]

#: The fields against which an adapter is validated.
VALIDATED = frozenset({"source", "linears", "dtype", "max_lora_rank"})
#: The operator's own values, which stay when `lmaas up` registers the base model of its settings again. Micro-dollars.
PRICES = ("prompt_price", "cached_price", "completion_price", "engine_price")
CHANGEABLE = frozenset({"min_replicas", "max_replicas", "idle_timeout_s", "cpus", "accelerators", *PRICES})


def _read(row: Row[Any]) -> BaseModel:
    return BaseModel(**row._asdict() | {"kind": PoolKind(row.kind)})


def kind_is_fixed(model: BaseModel, kind: PoolKind, param: str) -> InvalidRequest:
    """Return the error for a change that would make the base model one of another kind."""
    return InvalidRequest(
        f"The base model '{model.name}' is of the kind '{model.kind}', and '{param}' would make it one of the kind '{kind}'. "
        "A kind cannot change. Add a base model with another name.",
        code="kind_is_fixed",
        param=param,
    )


def _stored(model: BaseModel) -> dict[str, Any]:
    """Return the columns that are written: all but the time of creation, which the database sets."""
    return {name: value for name, value in asdict(model).items() if name != "created_at"}


async def put_base_model(db: Database, model: BaseModel, *, audit: Audit | None = None) -> BaseModel:
    """Add the base model, or bring the one of this name to these values; its id and an operator's bounds and prices stay.

    Raises InvalidRequest if the one of this name is of another kind.
    """
    values = _stored(model) | {"id": model.id or new_id("mod")}
    changes = {name: value for name, value in values.items() if name not in CHANGEABLE | {"id", "name"}}
    put = insert(base_models).values(values).on_conflict_do_update(index_elements=["name"], index_where=_IS_THERE, set_=changes)
    present = select(*_COLUMNS).where(base_models.c.name == model.name, _IS_THERE).with_for_update()
    async with db.begin(OPERATOR) as connection:
        await lock_name(connection, model.name)
        before = (await connection.execute(present)).one_or_none()
        if before is not None and before.kind != model.kind:
            raise kind_is_fixed(_read(before), model.kind, "source")
        after = (await connection.execute(put.returning(*_COLUMNS))).one()
        if before != after:
            await record(connection, audit, None, model.name)
        return _read(after)


async def lock_name(connection: AsyncConnection, name: str, *, shared: bool = False) -> None:
    """Lock a name until the end of the transaction. A base model and an adapter must not have the same name, and no row stands for a name
    that is free. The creation of a base model takes the lock exclusively, and uploads of adapters share it.
    """
    lock = func.pg_advisory_xact_lock_shared if shared else func.pg_advisory_xact_lock
    await connection.execute(select(lock(_NAME_LOCK, func.hashtext(name))))


async def list_base_models(db: Database, part: Part | None = None) -> list[BaseModel]:
    """Return the base models, or a part of them, by name. Raises InvalidRequest for a part after an unknown one."""
    query = select(*_COLUMNS).where(_IS_THERE)
    async with db.begin(SYSTEM) as connection:
        return [_read(row) for row in await rows_of(connection, query, part, base_models.c.name, base_models.c.id)]


async def list_pool_ids(db: Database) -> list[str]:
    """Return every pool that may still have usage events, including those deleted in the last day."""
    lately = base_models.c.deleted_at > func.now() - func.make_interval(0, 0, 0, 1)
    async with db.begin(SYSTEM) as connection:
        return list((await connection.execute(select(base_models.c.id).where(_IS_THERE | lately))).scalars())


async def get_base_model(db: Database, id_or_name: str) -> BaseModel:
    """Return a base model by id or by name. Raises NotFound."""
    query = select(*_COLUMNS).where((base_models.c.name == id_or_name) | (base_models.c.id == id_or_name), _IS_THERE)
    # A name of an older release may be another's id, which counts more.
    query = query.order_by((base_models.c.id == id_or_name).desc()).limit(1)
    async with db.begin(SYSTEM) as connection:
        row = (await connection.execute(query)).first()
    if row is None:
        raise NotFound("The base model does not exist.", code="base_model_not_found", param="base_model")
    return _read(row)


async def create_base_model(db: Database, model: BaseModel, *, dry_run: bool = False, audit: Audit | None = None) -> BaseModel:
    """Add a base model and return it; with `dry_run`, return what it would be and store nothing.

    Raises Conflict if its name is taken by another base model or by a tenant's adapter.
    """
    values = _stored(model) | {"id": new_id("mod")}
    async with db.begin(OPERATOR) as connection:
        await lock_name(connection, model.name)
        if (await connection.execute(select(adapters.c.id).where(adapters.c.name == model.name).limit(1))).first():
            raise Conflict(f"A tenant has an adapter named '{model.name}'. Choose another name.", code="name_taken", param="name")
        query = insert(base_models).values(values).on_conflict_do_nothing(index_elements=["name"], index_where=_IS_THERE)
        row = (await connection.execute(query.returning(*_COLUMNS))).one_or_none()
        if row is None:
            raise Conflict(f"A base model named '{model.name}' exists already. Choose another name.", code="name_taken", param="name")
        await record(connection, audit, None, model.name)
        if dry_run:
            await connection.rollback()
    return _read(row)


async def change_base_model(
    db: Database, name: str, changes: dict[str, Any], *, seen: BaseModel | None = None, dry_run: bool = False, audit: Audit | None = None
) -> BaseModel:
    """Change some of its values; with `dry_run`, return what the base model would be and store nothing.

    `seen` is what the changes were decided on. Raises ChangedMeanwhile if the base model is something else by now, NotFound, and Conflict
    for values that adapters were validated against or that replicas run with, while there are any.
    """
    async with db.begin(OPERATOR) as connection:
        model = await _locked(connection, name)
        if seen is not None and seen != model:
            raise ChangedMeanwhile
        changes = {column: value for column, value in changes.items() if value != getattr(model, column)}
        if changes.keys() & VALIDATED:
            await _refuse_if_used(connection, model.id, "changed in " + ", ".join(sorted(changes.keys() & VALIDATED)))
        if changes:
            query = update(base_models).where(base_models.c.id == model.id).values(changes).returning(*_COLUMNS)
            model = _read((await connection.execute(query)).one())
            await record(connection, audit, None, model.name)
        if dry_run:
            await connection.rollback()
    return model


async def delete_base_model(db: Database, name: str, *, audit: Audit | None = None) -> str:
    """Delete a base model and return its id. Its row stays for usage reports. Raises NotFound, and Conflict while it has adapters or
    replicas."""
    async with db.begin(OPERATOR) as connection:
        found = await _locked(connection, name)
        await _refuse_if_used(connection, found.id, "deleted")
        await connection.execute(update(base_models).where(base_models.c.id == found.id).values(deleted_at=func.now()))
        await record(connection, audit, None, found.name)
    return found.id


async def _locked(connection: AsyncConnection, name: str) -> BaseModel:
    # The strongest lock: a new adapter or replica of it waits for this transaction, and this one for it.
    found = (base_models.c.name == name) | (base_models.c.id == name)
    query = select(*_COLUMNS).where(found, _IS_THERE).with_for_update()
    query = query.order_by((base_models.c.id == name).desc()).limit(1)
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise NotFound("The base model does not exist.", code="base_model_not_found")
    return _read(row)


async def _refuse_if_used(connection: AsyncConnection, model_id: str, what: str) -> None:
    for table, condition, words in (
        (adapters, adapters.c.base_model_id == model_id, "adapters"),
        (replicas, (replicas.c.base_model_id == model_id) & replicas.c.observed.not_in(TERMINAL), "replicas"),
    ):
        count = (await connection.execute(select(func.count()).select_from(table).where(condition))).scalar_one()
        if count:
            raise Conflict(f"The base model has {count} {words}: as long as it does, it cannot be {what}.", code="base_model_in_use")
