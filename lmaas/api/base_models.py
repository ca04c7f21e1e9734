"""Base models, and the pools of their replicas, over HTTP."""

import asyncio
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lmaas.adapters.safetensors import base_model_shapes
from lmaas.api.context import Api, audited, check_body, in_range, is_dry_run, json_body
from lmaas.audit import Action
from lmaas.config import Settings
from lmaas.engine.arguments import refusal
from lmaas.engine.source import context_length, engine_dtype, is_folder, model_config, model_folder
from lmaas.errors import InvalidRequest
from lmaas.http import JsonResponse
from lmaas.states import Desired, Observed
from lmaas.store import models, pools, replicas
from lmaas.types import AUTO, is_model_name

#: What an operator may set, with its bounds; None as a value means the setting's.
BOUNDS: dict[str, tuple[type, float, float]] = {
    "min_replicas": (int, 0, 1000),
    "max_replicas": (int, 1, 1000),
    "idle_timeout_s": (float, 1, 86400 * 7),
    "cpus": (float, 0.01, 4096),
    "accelerators": (int, 0, 64),
    **dict.fromkeys(models.PRICES, (int, 0, models.MAX_PRICE)),
}
#: How an engine is run: for replicas that start after the change.
ENGINE: dict[str, tuple[type, float, float]] = {
    "max_loras": (int, 1, 1024),
    "max_cpu_loras": (int, 1, 100_000),
    "max_num_seqs": (int, 1, 4096),
    "max_model_len": (int, 16, 10**7),
    "kv_cache_bytes": (int, 2**20, 2**43),
}
#: What adapters are validated against.
VALIDATED: dict[str, tuple[type, float, float]] = {"max_lora_rank": (int, 1, 512)}
NUMBERS = BOUNDS | ENGINE | VALIDATED
WORDS = {"source": str, "dtype": str, "engine_args": str}
FIELDS: dict[str, type] = {name: kind for name, (kind, _, _) in NUMBERS.items()} | WORDS
#: Null puts the default back: the setting's, or 0 for prices.
NULLABLE = frozenset(FIELDS) - {"source"}
MAX_WORDS = 1000


def shown_model(settings: Settings, model: models.BaseModel) -> dict[str, Any]:
    """A base model as the API shows it: without its tensors, and with the bounds that hold."""
    shown = {"object": "base_model"} | {name: getattr(model, name) for name in models.BaseModel.__slots__ if name != "linears"}
    usual = {"min_replicas": 0, "max_replicas": settings.engine_max_replicas, "idle_timeout_s": settings.idle_timeout_s}
    usual["cpus"] = settings.engine_cpus
    if settings.engine_accelerators is not None:
        usual["accelerators"] = settings.engine_accelerators
    return shown | {name: value for name, value in usual.items() if shown[name] is None}


async def shown_pools(api: Api, found: list[models.BaseModel]) -> list[dict[str, Any]]:
    """Base models with what their pools do now, and why."""
    states = await pools.pool_states_by_id(api.db)
    alive = await replicas.list_replicas(api.db, limit=None)
    shown = []
    for model in found:
        failed = await replicas.failed_starts(api.db, model.id)
        mine = [row for row in alive if row.base_model_id == model.id]
        shown.append(shown_model(api.settings, model) | {"pool": _shown_pool(model, mine, states.get(model.id), failed)})
    return shown


def _shown_pool(
    model: models.BaseModel, alive: list[replicas.Replica], state: pools.PoolState | None, failed: replicas.FailedStarts | None
) -> dict[str, Any]:
    decision = state.decision if state is not None else {}
    idle = decision.get("idle") or {}
    hourly = model.engine_price
    return {
        "desired": sum(row.desired == Desired.RUNNING for row in alive),
        **{name: sum(row.observed == name for row in alive) for name in (Observed.STARTING, Observed.READY, Observed.DRAINING)},
        "wanted": decision.get("wanted", 0),
        "reason": decision.get("reason"),
        "waits_for_machine": bool(decision.get("blocked")),
        "decided_at": state.decided_at.isoformat() if state is not None else None,
        "start_s": decision.get("start_s"),
        # What is done when the pool is idle, in seconds since its last request, and what that costs.
        "keep_warm": {
            "until_s": idle.get("keep_s"),
            "again_from_s": idle.get("ready_s"),
            "again_until_s": idle.get("until_s"),
            "idle_times_seen": idle.get("gaps", 0),
            "engine_s_per_idle_time": idle.get("idle_engine_s") if idle.get("gaps") else None,
            "cold_share": idle.get("cold_share") if idle.get("gaps") else None,
            "cost_per_hour_microusd": hourly,
            "cost_per_idle_time_microusd": round(idle.get("idle_engine_s", 0) * hourly / 3600) if idle.get("gaps") else None,
        },
        "failed_starts": None
        if failed is None
        else {
            "count": failed.count,
            "reason": failed.reason,
            "ago_s": round(failed.ago_s, 1),
            "next_try_s": round(max(0.0, decision.get("backoff_s", 0.0) - failed.ago_s), 1),
        },
    }


async def list_models(api: Api, request: Request) -> Response:
    """Every base model with its pool's settings."""
    await api.operator(request)
    return JsonResponse({"object": "list", "data": await shown_pools(api, await models.list_base_models(api.db))})


async def get_model(api: Api, request: Request) -> Response:
    """One base model, by id or name: what its pool does, and why."""
    await api.operator(request)
    [shown] = await shown_pools(api, [await models.get_base_model(api.db, request.path_params["model"])])
    return JsonResponse(shown)


async def create_model(api: Api, request: Request) -> Response:
    """A new base model, and an empty pool for it. Its shapes are read from the headers of its weights."""
    principal = await api.operator(request)
    dry_run = is_dry_run(request)
    body = await json_body(request, {"name": str, **FIELDS}, ("name", "source"), NULLABLE)
    audit = audited(request, principal, Action.BASE_MODEL_CREATE)
    model = await models.create_base_model(api.db, await defined_model(api.settings, body), dry_run=dry_run, audit=audit)
    return JsonResponse((await shown_pools(api, [model]))[0], status_code=200 if dry_run else 201)


def _defaults(settings: Settings) -> dict[str, Any]:
    """Return the values of a base model that gives none, but for those that are null in the database."""
    values: dict[str, Any] = {name: getattr(settings, f"engine_{name}") for name in (*ENGINE, *VALIDATED)}
    # Engine arguments are not taken from the settings: those are for the default model.
    return values | {"engine_args": "", "dtype": settings.engine_dtype} | dict.fromkeys(models.PRICES, 0)


async def defined_model(settings: Settings, body: dict[str, Any]) -> models.BaseModel:
    """Return the base model that the body of a creation defines, not stored yet. Reads the model's own files. Raises InvalidRequest."""
    check_body(body, {"name": str, **FIELDS}, ("name", "source"), NULLABLE)
    if not is_model_name(body["name"]):
        words = "A model's name has 1 to 63 lower-case letters, digits, '.', '_' or '-', and does not begin with 'mod_', as ids do."
        raise InvalidRequest(words, code="invalid_name", param="name")
    body = {name: value for name, value in body.items() if value is not None}
    _check(body)
    values = _defaults(settings) | body
    if "max_cpu_loras" not in body:
        values["max_cpu_loras"] = max(values["max_cpu_loras"], values["max_loras"])
    read = await _read(values["source"], values["dtype"], settings)
    longest = read.pop("longest")
    if "max_model_len" not in body and longest is not None:
        values["max_model_len"] = min(values["max_model_len"], longest)
    _check_together(values | {"longest": longest}, settings)
    return models.BaseModel(**{"id": ""} | values | read)


async def change_model(api: Api, request: Request) -> Response:
    """Other values for a base model. Null puts a default back. Values of engines hold for replicas that start from now on; what adapters
    were validated against (source, dtype, max_lora_rank) changes only while there are neither adapters nor replicas."""
    principal = await api.operator(request)
    dry_run = is_dry_run(request)
    given = await json_body(request, FIELDS, nullable=NULLABLE)
    _check(given)
    model = await models.get_base_model(api.db, request.path_params["model"])
    defaults = _defaults(api.settings)
    body: dict[str, Any] = {name: defaults.get(name) if value is None else value for name, value in given.items()}
    max_loras = body.get("max_loras", model.max_loras)
    if "max_cpu_loras" in given and given["max_cpu_loras"] is None:
        body["max_cpu_loras"] = max(body["max_cpu_loras"], max_loras)
    # What is as it should be is no change.
    changes = {name: value for name, value in body.items() if value != getattr(model, name)}
    longest = None
    if changes.keys() & {"source", "dtype"} or changes.get("max_model_len", 0) > model.max_model_len:
        read = await _read(changes.get("source", model.source), changes.get("dtype", model.dtype), api.settings)
        longest = read.pop("longest")
        if "max_model_len" in changes and given["max_model_len"] is None and longest is not None:
            changes["max_model_len"] = min(changes["max_model_len"], longest)
        if changes.keys() & {"source", "dtype"}:
            changes |= read
    changes = {name: value for name, value in changes.items() if value != getattr(model, name)}
    _check_together(asdict(model) | changes | {"longest": longest}, api.settings)
    if changes:
        audit = audited(request, principal, Action.BASE_MODEL_CHANGE)
        model = await models.change_base_model(api.db, model.id, changes, dry_run=dry_run, audit=audit)
    return JsonResponse((await shown_pools(api, [model]))[0])


async def delete_model(api: Api, request: Request) -> Response:
    """End a base model that has neither adapters nor replicas. What it has cost stays for the bill."""
    principal = await api.operator(request)
    audit = audited(request, principal, Action.BASE_MODEL_DELETE)
    model_id = await models.delete_base_model(api.db, request.path_params["model"], audit=audit)
    return JsonResponse({"object": "base_model.deleted", "id": model_id, "deleted": True})


async def _read(source: str, dtype: str, settings: Settings) -> dict[str, Any]:
    """What the model's own files say: `source`, `linears`, `dtype`, and `longest`, its context length or None. Raises InvalidRequest."""

    def read() -> dict[str, Any]:
        folder = model_folder(source)
        config = model_config(folder)
        linears = {path: list(shape) for path, shape in base_model_shapes(folder).items()}
        # A hub id stays one: engines elsewhere fetch it themselves.
        kept = str(folder) if is_folder(source) else source
        decided = engine_dtype(settings.engine_dtype if dtype == AUTO else dtype, config)
        return {"source": kept, "linears": linears, "dtype": decided, "longest": context_length(config)}

    return await asyncio.to_thread(read)


def _check(body: dict[str, Any]) -> None:
    """Check each value by itself; null is allowed. Raises InvalidRequest."""
    for name, (_, low, high) in NUMBERS.items():
        in_range(body, name, low, high)
    for name in WORDS:
        text = body.get(name) or ""
        if len(text) > MAX_WORDS or not text.isprintable():
            raise InvalidRequest(f"'{name}' may have {MAX_WORDS} printable characters at most.", code="out_of_range", param=name)
    source = body.get("source")
    if source is not None and (not source.strip() or source.startswith("-") or source != source.strip()):
        raise InvalidRequest("'source' is a folder or a hub id.", code="out_of_range", param="source")
    if why := refusal(body.get("engine_args") or ""):
        raise InvalidRequest(f"'engine_args': {why}.", code="out_of_range", param="engine_args")


def _check_together(values: dict[str, Any], settings: Settings) -> None:
    """What must fit together. Raises InvalidRequest."""
    high = settings.engine_max_replicas if values.get("max_replicas") is None else values["max_replicas"]
    for name, bound, what in (
        ("min_replicas", high, "'max_replicas'"),
        ("max_model_len", values["longest"], "the model's own"),
    ):
        if values.get(name) is not None and bound is not None and values[name] > bound:
            raise InvalidRequest(f"'{name}' must not be more than {what} ({bound}).", code="out_of_range", param=name)
    if values["max_loras"] > values["max_cpu_loras"]:
        raise InvalidRequest("'max_loras' must not be more than 'max_cpu_loras'.", code="out_of_range", param="max_loras")
