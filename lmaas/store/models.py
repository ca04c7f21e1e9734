"""Base models: the shared weights, one pool of replicas each."""

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert

from lmaas.errors import NotFound
from lmaas.store.database import Database, new_id
from lmaas.store.tables import base_models
from lmaas.types import BaseModelShapes


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
    #: Distinct adapters in one batch.
    max_loras: int
    #: Adapters resident on an engine.
    max_cpu_loras: int
    #: Sequences that an engine runs at once: a replica's slots.
    max_num_seqs: int
    max_model_len: int
    kv_cache_bytes: int
    engine_args: str
    #: An operator's own bounds; None means the setting's.
    min_replicas: int | None = None
    max_replicas: int | None = None
    idle_timeout_s: float | None = None
    #: What a replica takes from its machine; None means the setting's.
    cpus: float | None = None
    accelerators: int | None = None
    #: What tenants pay: micro-dollars per million tokens.
    prompt_price: int = 0
    cached_price: int = 0
    completion_price: int = 0
    #: What an engine costs us: micro-dollars per hour.
    engine_price: int = 0

    @property
    def shapes(self) -> BaseModelShapes:
        """What an adapter must fit."""
        return BaseModelShapes({name: (out, into) for name, (out, into) in self.linears.items()}, self.dtype, self.max_lora_rank)


_COLUMNS = [base_models.c[name] for name in BaseModel.__slots__]

#: What an operator may change while the service runs; the rest would change what an adapter was validated against.
PRICES = ("prompt_price", "cached_price", "completion_price", "engine_price")
CHANGEABLE = frozenset({"min_replicas", "max_replicas", "idle_timeout_s", "cpus", "accelerators", *PRICES})
#: 4,000 $. The charge of a request of 900 million tokens, at the price of `priority`, fits the ledger's BIGINT, and the 14 digits of
#: Lua's JSON hold a price.
MAX_PRICE = 4 * 10**9


async def put_base_model(db: Database, model: BaseModel) -> BaseModel:
    """Add the base model, or bring the one of this name to these values; its id and an operator's bounds and prices stay."""
    values = asdict(model) | {"id": model.id or new_id("mod")}
    changes = {name: value for name, value in values.items() if name not in CHANGEABLE | {"id", "name"}}
    query = insert(base_models).values(values).on_conflict_do_update(index_elements=["name"], set_=changes).returning(*_COLUMNS)
    async with db.begin() as connection:
        return BaseModel(*(await connection.execute(query)).one())


async def change_base_model(db: Database, name: str, changes: dict[str, Any]) -> BaseModel:
    """Change some of CHANGEABLE. Raises NotFound."""
    async with db.begin() as connection:
        row = (
            await connection.execute(update(base_models).where(base_models.c.name == name).values(changes).returning(*_COLUMNS))
        ).one_or_none()
    if row is None:
        raise NotFound("The base model does not exist.", code="base_model_not_found")
    return BaseModel(*row)


async def list_base_models(db: Database) -> list[BaseModel]:
    """Every base model, by name."""
    async with db.begin() as connection:
        return [BaseModel(*row) for row in await connection.execute(select(*_COLUMNS).order_by(base_models.c.name))]


async def get_base_model(db: Database, id_or_name: str) -> BaseModel:
    """By id or by name. Raises NotFound."""
    query = select(*_COLUMNS).where((base_models.c.name == id_or_name) | (base_models.c.id == id_or_name))
    async with db.begin() as connection:
        row = (await connection.execute(query)).first()
    if row is None:
        raise NotFound("The base model does not exist.", code="base_model_not_found", param="base_model")
    return BaseModel(*row)
