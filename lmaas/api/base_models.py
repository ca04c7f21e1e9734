"""Handlers for base models and the pools of their replicas."""

import asyncio
from dataclasses import asdict
from typing import Any

import msgspec
from msgspec import UNSET, Struct

from lmaas.adapters.safetensors import base_model_shapes
from lmaas.api.context import Api, ApiCall, WithStatus
from lmaas.api.operation import page_of
from lmaas.api.shapes.common import DryRun, Page, Paging
from lmaas.api.shapes.models import (
    BackgroundWork,
    BaseModel,
    BaseModelChange,
    DeletedBaseModel,
    FailedStarts,
    KeepWarm,
    NewBaseModel,
    Pool,
)
from lmaas.config import Settings
from lmaas.engine.arguments import refusal
from lmaas.engine.default_model import registered_name
from lmaas.engine.kinds import context_length, declared_kind, fitting_kind
from lmaas.engine.source import engine_dtype, is_folder, model_config, model_folder
from lmaas.errors import InvalidRequest
from lmaas.states import Desired, Observed, PoolKind
from lmaas.store import models, pools, replicas
from lmaas.store.paging import Part
from lmaas.types import AUTO

#: Fields about the running of an engine, for replicas that start after the change, and about the validation of adapters. The defaults are
#: settings.
_FROM_SETTINGS = ("max_loras", "max_cpu_loras", "max_num_seqs", "max_model_len", "kv_cache_bytes", "max_lora_rank")
_WORDS = ("source", "dtype", "engine_args")
#: The least default of `max_num_seqs` for a model that embeds: texts are short, and take no KV cache or only for one step.
EMBEDDED_AT_ONCE = 64


async def shown_models(api: Api, found: list[models.BaseModel]) -> list[BaseModel]:
    """Return base models as the API shows them: with the values that hold, and what their pools do now, and why."""
    states = await pools.pool_states_by_id(api.db)
    alive = await replicas.list_replicas(api.db)
    shown = []
    for model in found:
        failed = await replicas.failed_starts(api.db, model.id)
        mine = [row for row in alive if row.base_model_id == model.id]
        pool = _shown_pool(model, mine, states.get(model.id), failed)
        shown.append(BaseModel(**_effective(api.settings, model), pool=pool))
    return shown


def _effective(settings: Settings, model: models.BaseModel) -> dict[str, Any]:
    values = {name: getattr(model, name) for name in models.BaseModel.__slots__ if name != "linears"}
    usual: dict[str, Any] = {
        "min_replicas": 0,
        "max_replicas": settings.engine_max_replicas,
        "idle_timeout_s": settings.idle_timeout_s,
        "cpus": settings.engine_cpus,
        "accelerators": settings.engine_accelerators,
    }
    return values | {name: value for name, value in usual.items() if values[name] is None}


def _shown_pool(
    model: models.BaseModel, alive: list[replicas.Replica], state: pools.PoolState | None, failed: replicas.FailedStarts | None
) -> Pool:
    decision = _decision(state)
    return Pool(
        desired=sum(row.desired == Desired.RUNNING for row in alive),
        starting=sum(row.observed == Observed.STARTING for row in alive),
        ready=sum(row.observed == Observed.READY for row in alive),
        draining=sum(row.observed == Observed.DRAINING for row in alive),
        wanted=decision.wanted,
        queued=decision.queued,
        running=decision.running,
        reason=decision.reason,
        waits_for_machine=decision.blocked,
        decided_at=state.decided_at if state is not None else None,
        start_s=decision.start_s,
        keep_warm=_shown_idleness(decision.idle, model.engine_price),
        background=BackgroundWork(**msgspec.structs.asdict(decision.background)),
        failed_starts=None
        if failed is None
        else FailedStarts(
            count=failed.count,
            reason=failed.reason,
            ago_s=round(failed.ago_s, 1),
            next_try_s=round(max(0.0, decision.backoff_s - failed.ago_s), 1),
        ),
    )


class _Idle(Struct, frozen=True):
    """The fields of the plan for idle times in a decision that are read."""

    keep_s: float | None = None
    ready_s: float | None = None
    until_s: float | None = None
    gaps: float = 0
    idle_engine_s: float = 0
    cold_share: float | None = None


class _Background(Struct, frozen=True):
    """The fields of the background work in a decision that are read."""

    lines: int = 0
    tokens: int = 0
    due_s: int | None = None
    queued: int = 0
    running: int = 0
    reserve: int = 0
    put_back: int = 0
    tokens_per_s: float | None = None
    replicas: int = 0


class _Decision(Struct, frozen=True):
    """The fields of a controller's decision that are read."""

    wanted: int = 0
    reason: str | None = None
    blocked: bool = False
    start_s: float | None = None
    backoff_s: float = 0
    queued: int = 0
    running: int = 0
    idle: _Idle = _Idle()
    background: _Background = _Background()


def _decision(state: pools.PoolState | None) -> _Decision:
    """Return the last decision; an empty one if there is none, or if a controller of another release has written something else."""
    try:
        return _Decision() if state is None else msgspec.convert(state.decision, _Decision)
    except msgspec.ValidationError:
        return _Decision()


def _shown_idleness(idle: _Idle, hourly: int) -> KeepWarm:
    has_history = idle.gaps > 0
    return KeepWarm(
        until_s=idle.keep_s,
        again_from_s=idle.ready_s,
        again_until_s=idle.until_s,
        idle_times_seen=idle.gaps,
        engine_s_per_idle_time=idle.idle_engine_s if has_history else None,
        cold_share=idle.cold_share if has_history else None,
        cost_per_hour_microusd=hourly,
        cost_per_idle_time_microusd=round(idle.idle_engine_s * hourly / 3600) if has_history else None,
    )


async def list_models(api: Api, call: ApiCall[None, Paging]) -> Page[BaseModel]:
    """Return a page of base models, by name."""
    limit = call.query.limit
    found = await models.list_base_models(api.db, Part(limit, call.query.after))
    # The state of a model's pool is read only for models that are shown.
    page = page_of(list(found), [model.id for model in found], limit)
    return Page(data=await shown_models(api, page.data), first_id=page.first_id, last_id=page.last_id, has_more=page.has_more)


async def get_model(api: Api, call: ApiCall[None, None]) -> BaseModel:
    """Return one base model, by id or name: what its pool does, and why."""
    [shown] = await shown_models(api, [await models.get_base_model(api.db, call.path["model"])])
    return shown


async def create_model(api: Api, call: ApiCall[NewBaseModel, DryRun]) -> BaseModel | WithStatus:
    """Create a base model with an empty pool; a dry run has the status 200."""
    defined = await defined_model(api.settings, call.body)
    model = await models.create_base_model(api.db, defined, dry_run=call.query.dry_run, audit=call.audit)
    [shown] = await shown_models(api, [model])
    return WithStatus(shown, 200) if call.query.dry_run else shown


def _given(body: Struct) -> dict[str, Any]:
    return {name: getattr(body, name) for name in body.__struct_fields__ if getattr(body, name) is not UNSET}


def _defaults(settings: Settings, name: str, kind: PoolKind) -> dict[str, Any]:
    """Return the values of a base model of this name and kind that gives none, but for those that are null in the database."""
    values: dict[str, Any] = {name: getattr(settings, f"engine_{name}") for name in _FROM_SETTINGS}
    if kind is PoolKind.EMBED:
        values["max_num_seqs"] = max(values["max_num_seqs"], EMBEDDED_AT_ONCE)
    # The engine arguments of the settings are for the base model of the settings.
    engine_args = settings.engine_args if name == registered_name(settings) else ""
    return values | {"engine_args": engine_args, "dtype": settings.engine_dtype} | dict.fromkeys(models.PRICES, 0)


async def defined_model(settings: Settings, new: NewBaseModel) -> models.BaseModel:
    """Return the base model that the body of a creation defines, not stored yet. Reads the model's own files. Raises InvalidRequest."""
    body = {name: value for name, value in _given(new).items() if value is not None}
    _check(body)
    read = await _read(body["source"], body.get("dtype", settings.engine_dtype), body.get("kind"), settings)
    longest = read.pop("longest")
    read["kind"] = fitting_kind(read["kind"], body.get("kind"))
    values = _defaults(settings, new.name, read["kind"]) | body
    if "max_cpu_loras" not in body:
        values["max_cpu_loras"] = max(values["max_cpu_loras"], values["max_loras"])
    if "max_model_len" not in body and longest is not None:
        values["max_model_len"] = min(values["max_model_len"], longest)
    values |= read
    _check_together(values | {"longest": longest}, settings)
    return models.BaseModel(**{"id": ""} | values)


async def change_model(api: Api, call: ApiCall[BaseModelChange, DryRun]) -> BaseModel:
    """Change values of a base model. Null puts a default back.

    The kind cannot change. Values of engines hold for replicas that start from now on; what adapters were validated against (source,
    dtype, max_lora_rank) changes only while there are neither adapters nor replicas.
    """
    given = _given(call.body)
    _check(given)
    model = await models.get_base_model(api.db, call.path["model"])
    while changes := await _changes(api.settings, model, given):
        try:
            model = await models.change_base_model(api.db, model.id, changes, seen=model, dry_run=call.query.dry_run, audit=call.audit)
            break
        except models.ChangedMeanwhile:
            # The values of the other request may not fit together with these, or may be the same.
            model = await models.get_base_model(api.db, model.id)
    [shown] = await shown_models(api, [model])
    return shown


async def _changes(settings: Settings, model: models.BaseModel, given: dict[str, Any]) -> dict[str, Any]:
    """Return the values that differ from the model's, if it gets what is `given`. Raises InvalidRequest."""
    defaults = _defaults(settings, model.name, model.kind)
    body: dict[str, Any] = {name: defaults.get(name) if value is None else value for name, value in given.items()}
    kind = body.pop("kind", None)
    if kind is not None and kind is not model.kind:
        raise models.kind_is_fixed(model, kind, "kind")
    max_loras = body.get("max_loras", model.max_loras)
    if "max_cpu_loras" in given and given["max_cpu_loras"] is None:
        body["max_cpu_loras"] = max(body["max_cpu_loras"], max_loras)
    # A value that is already set is not a change.
    changes = {name: value for name, value in body.items() if value != getattr(model, name)}
    longest = None
    if changes.keys() & {"source", "dtype"} or changes.get("max_model_len", 0) > model.max_model_len:
        read = await _read(changes.get("source", model.source), changes.get("dtype", model.dtype), model.kind, settings)
        longest, declared = read.pop("longest"), read.pop("kind")
        if declared not in (None, model.kind):
            raise models.kind_is_fixed(model, declared, "source")
        if "max_model_len" in changes and given["max_model_len"] is None and longest is not None:
            changes["max_model_len"] = min(changes["max_model_len"], longest)
        if changes.keys() & {"source", "dtype"}:
            changes |= read
    changes = {name: value for name, value in changes.items() if value != getattr(model, name)}
    _check_together(asdict(model) | changes | {"longest": longest}, settings)
    return changes


async def delete_model(api: Api, call: ApiCall[None, None]) -> DeletedBaseModel:
    """Delete a base model that has neither adapters nor replicas."""
    model_id = await models.delete_base_model(api.db, call.path["model"], audit=call.audit)
    return DeletedBaseModel(id=model_id, deleted=True)


async def _read(source: str, dtype: str, asked: PoolKind | None, settings: Settings) -> dict[str, Any]:
    """Return the facts of the model's own files: `source`, `kind`, `linears`, `dtype`, and `longest`, its context length. `kind` and
    `longest` may be None. If they name no kind, it is `asked`. Raises InvalidRequest."""

    def read() -> dict[str, Any]:
        folder = model_folder(source)
        config = model_config(folder)
        # A hub id stays one: engines elsewhere fetch it themselves.
        kept = str(folder) if is_folder(source) else source
        decided = engine_dtype(settings.engine_dtype if dtype == AUTO else dtype, config)
        declared = declared_kind(folder, config)
        kind = declared or asked or PoolKind.GENERATE
        linears = {path: list(shape) for path, shape in base_model_shapes(folder, kind).items()}
        longest = context_length(folder, config, kind)
        return {"source": kept, "kind": declared, "linears": linears, "dtype": decided, "longest": longest}

    return await asyncio.to_thread(read)


def _check(body: dict[str, Any]) -> None:
    """Check the rules that the types of the body cannot express. Raises InvalidRequest."""
    for name in _WORDS:
        if not (body.get(name) or "").isprintable():
            raise InvalidRequest(f"'{name}' has characters that cannot be printed.", code="out_of_range", param=name)
    source = body.get("source")
    if source is not None and (not source.strip() or source.startswith("-") or source != source.strip()):
        raise InvalidRequest("'source' must be a folder or a hub id.", code="out_of_range", param="source")
    if why := refusal(body.get("engine_args") or ""):
        raise InvalidRequest(f"'engine_args': {why}.", code="out_of_range", param="engine_args")


def _check_together(values: dict[str, Any], settings: Settings) -> None:
    """Check the values that depend on each other. Raises InvalidRequest."""
    high = settings.engine_max_replicas if values.get("max_replicas") is None else values["max_replicas"]
    for name, bound, what in (
        ("min_replicas", high, "'max_replicas'"),
        ("max_model_len", values["longest"], "the model's own"),
    ):
        if values.get(name) is not None and bound is not None and values[name] > bound:
            raise InvalidRequest(f"'{name}' must not be more than {what} ({bound}).", code="out_of_range", param=name)
    if values["kind"] is PoolKind.EMBED and values["completion_price"]:
        raise InvalidRequest(
            "'completion_price' must be 0: a model that embeds text generates no tokens.", code="out_of_range", param="completion_price"
        )
    if values["max_loras"] > values["max_cpu_loras"]:
        raise InvalidRequest("'max_loras' must not be more than 'max_cpu_loras'.", code="out_of_range", param="max_loras")
