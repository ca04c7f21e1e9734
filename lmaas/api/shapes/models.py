"""Base models, their pools, and replicas."""

from datetime import datetime
from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from lmaas.api.shapes.common import ModelName, Paging, Shape
from lmaas.states import Desired, Observed, PoolKind
from lmaas.types import MAX_PRICE

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Source = Annotated[str, Meta(max_length=1000, description="A folder, or a model's name on a hub. Its weights say what adapters must fit.")]
EngineArgs = Annotated[
    str, Meta(max_length=1000, description="More arguments for the engine: options of an allowlist, in docs/how-to/base-models.md.")
]
Price = Annotated[int, Meta(ge=0, le=MAX_PRICE, description="Micro-dollars per million tokens.")]
EnginePrice = Annotated[int, Meta(ge=0, le=MAX_PRICE, description="Micro-dollars per hour of an engine.")]


class BaseModelChange(Shape, frozen=True, kw_only=True):
    """Values to set. Null puts the default back; one that is not given stays as it is."""

    source: Source | UnsetType = UNSET
    kind: (
        Annotated[PoolKind, Meta(description="What its engines do. By default what the model's files say. It cannot change.")]
        | UnsetType
        | None
    ) = UNSET
    dtype: Dtype | UnsetType | None = UNSET
    max_lora_rank: Annotated[int, Meta(ge=1, le=512)] | UnsetType | None = UNSET
    max_loras: (
        Annotated[int, Meta(ge=1, le=1024, description="Different adapters that an engine runs at the same time.")] | UnsetType | None
    ) = UNSET
    max_cpu_loras: Annotated[int, Meta(ge=1, le=100_000, description="Adapters in an engine's memory.")] | UnsetType | None = UNSET
    max_num_seqs: Annotated[int, Meta(ge=1, le=4096, description="Sequences that an engine runs at once.")] | UnsetType | None = UNSET
    max_model_len: Annotated[int, Meta(ge=16, le=10**7, description="Context, in tokens.")] | UnsetType | None = UNSET
    kv_cache_bytes: Annotated[int, Meta(ge=2**20, le=2**43)] | UnsetType | None = UNSET
    engine_args: EngineArgs | UnsetType | None = UNSET
    min_replicas: Annotated[int, Meta(ge=0, le=1000)] | UnsetType | None = UNSET
    max_replicas: Annotated[int, Meta(ge=1, le=1000)] | UnsetType | None = UNSET
    idle_timeout_s: Annotated[float, Meta(ge=1, le=604_800, description="How long an idle pool may keep an engine.")] | UnsetType | None = (
        UNSET
    )
    cpus: Annotated[float, Meta(ge=0.01, le=4096, description="CPUs that a replica takes from its machine.")] | UnsetType | None = UNSET
    accelerators: Annotated[int, Meta(ge=0, le=64, description="Null: one where the machines have any.")] | UnsetType | None = UNSET
    prompt_price: Price | UnsetType | None = UNSET
    cached_price: Price | UnsetType | None = UNSET
    completion_price: Price | UnsetType | None = UNSET
    engine_price: EnginePrice | UnsetType | None = UNSET


class NewBaseModel(BaseModelChange, frozen=True, kw_only=True):
    """A base model to create, with an empty pool. A value that is null or not given is the default."""

    name: ModelName
    source: Source


class KeepWarm(Shape, frozen=True, kw_only=True):
    """The time for which an idle pool keeps an engine, in seconds since its last request, and its cost."""

    until_s: float | None
    again_from_s: float | None
    again_until_s: float | None
    idle_times_seen: float
    engine_s_per_idle_time: float | None
    cold_share: float | None
    cost_per_hour_microusd: int
    cost_per_idle_time_microusd: int | None


class FailedStarts(Shape, frozen=True, kw_only=True):
    """Starts of engines that failed in a row."""

    count: int
    reason: str
    ago_s: float
    next_try_s: float


class BackgroundWork(Shape, frozen=True, kw_only=True):
    """The background work of a pool, such as lines of batches."""

    lines: Annotated[int, Meta(description="Lines that wait.")]
    tokens: Annotated[int, Meta(description="Their estimated tokens.")]
    due_s: Annotated[int | None, Meta(description="Seconds until their earliest deadline.")]
    queued: Annotated[int, Meta(description="Background requests that wait in the queue.")]
    running: Annotated[int, Meta(description="Slots that background requests use.")]
    reserve: Annotated[int, Meta(description="Slots that background work leaves free for interactive requests.")]
    put_back: Annotated[int, Meta(description="How often a slot was taken back for interactive requests.")]
    tokens_per_s: Annotated[float | None, Meta(description="Estimated tokens that one replica has been seen to process in a second.")]
    replicas: Annotated[int, Meta(description="Replicas that are wanted for background work only.")]


class Pool(Shape, frozen=True, kw_only=True):
    """The replicas of a base model: how many there are in each state, what the controller has decided last, and why."""

    desired: int
    starting: int
    ready: int
    draining: int
    wanted: Annotated[int, Meta(description="By the autoscaler; fewer are desired where the machines are full.")]
    queued: Annotated[int, Meta(description="Requests that wait for a slot, as the controller saw them last.")]
    running: Annotated[int, Meta(description="Slots that requests use; background work is not counted.")]
    reason: str | None
    waits_for_machine: bool
    decided_at: datetime | None
    start_s: float | None
    keep_warm: KeepWarm
    background: BackgroundWork
    failed_starts: FailedStarts | None


class BaseModel(Shape, tag_field="object", tag="base_model", frozen=True, kw_only=True):
    """A base model with the values that hold, and what its pool does."""

    id: str
    name: str
    source: str
    kind: PoolKind
    dtype: Dtype
    max_lora_rank: int
    max_loras: int
    max_cpu_loras: int
    max_num_seqs: int
    max_model_len: int
    kv_cache_bytes: int
    engine_args: str
    min_replicas: int
    max_replicas: int
    idle_timeout_s: float
    cpus: float
    accelerators: int | None
    prompt_price: int
    cached_price: int
    completion_price: int
    engine_price: int
    created_at: datetime
    pool: Pool


class DeletedBaseModel(Shape, tag_field="object", tag="base_model.deleted", frozen=True, kw_only=True):
    """A base model that has been deleted."""

    id: str
    deleted: bool


class Start(Shape, frozen=True, kw_only=True):
    """The time of a replica's start by stage, in ms. `adapter_ms` runs beside `first_token_ms`. Other releases may record fewer."""

    by: Literal["zygote", "plain"]
    spawn_ms: int | UnsetType = UNSET
    zygote_ms: int | UnsetType = UNSET
    import_ms: int | UnsetType = UNSET
    weights_ms: int | UnsetType = UNSET
    kv_ms: int | UnsetType = UNSET
    warmup_ms: int | UnsetType = UNSET
    first_token_ms: int | UnsetType = UNSET
    adapter_ms: int | UnsetType = UNSET
    total_ms: int | UnsetType = UNSET


class Replica(Shape, tag_field="object", tag="replica", frozen=True, kw_only=True):
    """One engine and its supervisor: what the controller desires, and what the supervisor observes."""

    id: str
    base_model: str
    desired: Desired
    observed: Observed
    url: str | None
    reason: str | None
    created_at: datetime
    ready_at: datetime | None
    ended_at: datetime | None
    start: Annotated[Start, Meta(description="Known once the replica is ready.")] | None


class StoppingReplica(Shape, tag_field="object", tag="replica", frozen=True, kw_only=True):
    """A replica that drains and then stops."""

    id: str
    desired: Literal["stopped"]


class ReplicaQuery(Paging, frozen=True, kw_only=True):
    """The requested replicas."""

    ended: Annotated[bool, Meta(description="Also those that have ended.")] = False
