"""The OpenAPI document of the whole HTTP surface, served at `/openapi.json`."""

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from lmaas.admission.tiers import TIERS
from lmaas.metering.cogs import DIMENSIONS
from lmaas.states import START_PHASES, EnginePhase
from lmaas.store.models import MAX_PRICE, PRICES
from lmaas.types import NAME_PATTERN, Limits, Role

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
MAYBE_TEXT: Schema = {"type": ["string", "null"]}
DAY: Schema = {"type": "string", "format": "date"}
MOMENT: Schema = {"type": "string", "format": "date-time"}
MAYBE_MOMENT: Schema = {"type": ["string", "null"], "format": "date-time"}
NAME: Schema = {"type": "string", "pattern": f"^{NAME_PATTERN.pattern}$"}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _optional(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties}


def _inference(**prompt: Schema) -> Schema:
    """The body of a request for tokens. docs/parameters.md has every parameter, from the table by which the gateway checks them."""
    return {
        "type": "object",
        "required": ["model", *prompt],
        "properties": {"model": TEXT, **prompt, "stream": {"type": ["boolean", "null"]}},
        "additionalProperties": True,
        "description": "OpenAI's parameters, and those of vLLM that are safe to forward. Others are refused by name with 400 "
        "`unsupported_parameter`; null means that a parameter was not given. All parameters are listed in docs/parameters.md.",
    }


_VERSION = {
    "version": {"type": "integer", "minimum": 1},
    "content_hash": TEXT,
    "rank": COUNT,
    "target_modules": {"type": "array", "items": TEXT},
    "size_bytes": COUNT,
    "created_at": MOMENT,
}
_ADAPTER = {
    "object": TEXT,
    "id": TEXT,
    "name": NAME,
    "base_model": TEXT,
    "live_version": {"type": ["integer", "null"]},
    "latest_version": COUNT,
    "created_at": MOMENT,
}
_LIMITS: dict[str, Schema] = {field.name: {"type": ["integer", "null"], "minimum": 1} for field in fields(Limits)}
_TENANT = {
    "object": TEXT,
    "id": TEXT,
    "name": NAME,
    "tier": TEXT,
    "max_queued": COUNT,
    "max_adapters": COUNT,
    **_LIMITS,
    "effective_limits": _object(**_LIMITS) | {"description": "The tenant's own, otherwise its tier's."},
    "created_at": MOMENT,
}
_TENANT_FIELDS = {"tier": {"enum": list(TIERS)}, "max_queued": COUNT, "max_adapters": COUNT, **_LIMITS}
_KEY = {"object": TEXT, "id": TEXT, "role": TEXT, "name": TEXT, "prefix": TEXT, "created_at": MOMENT, "revoked_at": MAYBE_MOMENT, **_LIMITS}
_TOKENS = {"prompt_tokens": COUNT, "cached_tokens": COUNT, "completion_tokens": COUNT}
_PRICES: dict[str, Schema] = {
    name: {
        "type": "integer",
        "minimum": 0,
        "maximum": MAX_PRICE,
        "description": "Micro-dollars per hour of an engine." if name == "engine_price" else "Micro-dollars per million tokens.",
    }
    for name in PRICES
}
_OWN: dict[str, Schema] = {
    # Null: as the settings have it.
    "min_replicas": {"type": ["integer", "null"], "minimum": 0},
    "max_replicas": {"type": ["integer", "null"], "minimum": 1},
    "idle_timeout_s": {"type": ["number", "null"], "description": "How long an idle pool may keep an engine."},
    "cpus": {"type": ["number", "null"], "description": "What a replica takes from its machine."},
    "accelerators": {"type": ["integer", "null"], "minimum": 0, "description": "Null: one where the machines have any."},
}
_MODEL_FIELDS: dict[str, Schema] = {
    "source": {"type": "string", "description": "A folder, or a model's name on a hub. Its safetensors say what adapters must fit."},
    "dtype": {"enum": ["float32", "bfloat16", "float16", "auto"]},
    "max_lora_rank": {"type": "integer", "minimum": 1, "maximum": 512},
    "max_loras": {"type": "integer", "minimum": 1, "description": "Distinct adapters in one batch."},
    "max_cpu_loras": {"type": "integer", "minimum": 1, "description": "Adapters in an engine's memory."},
    "max_num_seqs": {"type": "integer", "minimum": 1, "description": "Sequences that an engine runs at once."},
    "max_model_len": {"type": "integer", "minimum": 16, "description": "Context, in tokens."},
    "kv_cache_bytes": COUNT,
    "engine_args": {"type": "string", "description": "More arguments for the engine: options of an allowlist, in docs/base-models.md."},
    **_OWN,
    **_PRICES,
}
_MAYBE_NUMBER: Schema = {"type": ["number", "null"]}
_POOL: Schema = _object(
    desired=COUNT,
    starting=COUNT,
    ready=COUNT,
    draining=COUNT,
    wanted=COUNT | {"description": "By the autoscaler; fewer are desired where the machines are full."},
    reason=MAYBE_TEXT,
    waits_for_machine={"type": "boolean"},
    decided_at=MAYBE_MOMENT,
    start_s=_MAYBE_NUMBER,
    keep_warm=_object(
        until_s=_MAYBE_NUMBER,
        again_from_s=_MAYBE_NUMBER,
        again_until_s=_MAYBE_NUMBER,
        idle_times_seen=_MAYBE_NUMBER,
        engine_s_per_idle_time=_MAYBE_NUMBER,
        cold_share=_MAYBE_NUMBER,
        cost_per_hour_microusd=COUNT,
        cost_per_idle_time_microusd={"type": ["integer", "null"]},
    )
    | {"description": "What is done when the pool is idle, in seconds since its last request, and what that costs."},
    failed_starts={
        "type": ["object", "null"],
        "properties": {"count": COUNT, "reason": TEXT, "ago_s": {"type": "number"}, "next_try_s": {"type": "number"}},
    },
)
_COGS_LINE: dict[str, Schema] = {"day": DAY, "tenant_id": MAYBE_TEXT, "tenant": MAYBE_TEXT, "base_model": TEXT, "adapter": MAYBE_TEXT}
_COGS: dict[str, Schema] = {
    "engine_ms": _object(total=COUNT, **{phase.value: COUNT for phase in EnginePhase}),
    "cost_microusd": COUNT,
    "charge_microusd": COUNT,
    "margin_microusd": {"type": "integer"},
    "margin_ratio": {"type": ["number", "null"], "description": "The margin's part of the charge."},
}

SCHEMAS: dict[str, Schema] = {
    "Error": _object(error=_object(message=TEXT, type=TEXT, param=MAYBE_TEXT, code=TEXT)),
    "Adapter": _object(**_ADAPTER),
    "AdapterVersion": _object(**_VERSION),
    "UploadedAdapter": _object(**(_ADAPTER | _VERSION)),
    "AdapterUpload": {
        "type": "object",
        "required": ["name", "base_model", "adapter_config", "adapter_model"],
        "properties": {
            "name": NAME,
            "base_model": TEXT,
            "activate": {"type": "string", "enum": ["true", "false"], "default": "true"},
            "if_changed": {
                "type": "string",
                "enum": ["true", "false"],
                "deprecated": True,
                "description": "Has no effect: content that a version has already never becomes a new one.",
            },
            "sha256": {"type": "string", "description": "Of adapter_model, in hex; checked if given."},
            "adapter_config": {"type": "string", "contentMediaType": "application/json"},
            "adapter_model": {"type": "string", "contentMediaType": "application/octet-stream"},
        },
    },
    "AdapterCheck": {
        "type": "object",
        "required": ["adapter_config", "adapter_model"],
        "properties": {
            "base_model": TEXT,
            "sha256": {"type": "string", "description": "Of adapter_model, in hex; checked if given."},
            "definition": {"type": "string", "description": "In place of base_model: the JSON of a NewBaseModel that does not exist yet."},
            "adapter_config": {"type": "string", "contentMediaType": "application/json"},
            "adapter_model": {"type": "string", "contentMediaType": "application/octet-stream"},
        },
    },
    "CheckedAdapter": _object(object=TEXT, **{name: _VERSION[name] for name in ("content_hash", "rank", "target_modules", "size_bytes")}),
    "Activation": _object(version={"type": "integer", "minimum": 1}),
    "Tenant": _object(**_TENANT),
    "NewTenant": _optional(name=NAME, **_TENANT_FIELDS) | {"required": ["name"]},
    "TenantChange": _optional(**_TENANT_FIELDS),
    "Key": _object(**_KEY),
    "NewKey": _optional(role={"enum": [role.value for role in Role]}, name=TEXT, **_LIMITS),
    "KeyChange": _optional(**_LIMITS),
    "CreatedKey": _object(**_KEY, key=TEXT),
    "BaseModel": _object(object=TEXT, id=TEXT, name=NAME, **_MODEL_FIELDS, pool=_POOL),
    "NewBaseModel": _optional(name=NAME, **_MODEL_FIELDS) | {"required": ["name", "source"]},
    "BaseModelChange": _optional(**_MODEL_FIELDS),
    "Replica": _object(
        object=TEXT,
        id=TEXT,
        base_model=TEXT,
        desired=TEXT,
        observed=TEXT,
        url=MAYBE_TEXT,
        reason=MAYBE_TEXT,
        created_at=MOMENT,
        ready_at=MAYBE_MOMENT,
        ended_at=MAYBE_MOMENT,
        start={
            "type": ["object", "null"],
            "description": "Where the time of its start went, in ms, once it is ready.",
            "properties": {"by": {"enum": ["zygote", "plain"]}} | dict.fromkeys(START_PHASES, COUNT),
        },
    ),
    "StoppingReplica": _object(object=TEXT, id=TEXT, desired=TEXT),
    "Usage": _object(
        object=TEXT,
        day=DAY,
        tenant=MAYBE_TEXT,
        model=TEXT,
        requests=COUNT,
        failed_requests=COUNT,
        **_TOKENS,
        run_ms=COUNT,
        charge_microusd=COUNT,
    ),
    "UsageEvent": _object(
        object=TEXT, request_id=TEXT, model=TEXT, status=TEXT, code=MAYBE_TEXT, **_TOKENS, charge_picousd=COUNT, created_at=MOMENT
    ),
    "Cogs": _object(
        object=TEXT,
        by={"type": "array", "items": {"enum": list(DIMENSIONS)}},
        data={
            "type": "array",
            "items": {
                "type": "object",
                "properties": _COGS_LINE | _COGS,
                "required": list(_COGS),
                "description": "Who it is, as far as it was asked for. What nobody used has the tenant null.",
            },
        },
        total=_object(**_COGS),
        reconciliation=_object(engine_ms=COUNT, allocated_ms=COUNT, unallocated_ms=COUNT),
    ),
    "Deleted": _object(object=TEXT, deleted={"type": "boolean"}),
    "Model": _object(id=TEXT, object=TEXT, created=COUNT, owned_by=TEXT, parent=MAYBE_TEXT, max_model_len=COUNT),
    "ChatRequest": _inference(messages={"type": "array", "minItems": 1, "items": {"type": "object"}}),
    "CompletionRequest": _inference(prompt={"type": ["string", "array"]}),
    "OpenAIAnswer": {"type": "object", "description": "As in OpenAI's API; with `stream`, server-sent events."},
}

#: Handler → what it takes, what it answers, and whether the answer is a list.
SHAPES: dict[str, tuple[str | None, str, bool]] = {
    "list_adapters": (None, "Adapter", True),
    "upload_adapter": ("AdapterUpload", "UploadedAdapter", False),
    "check_adapter": ("AdapterCheck", "CheckedAdapter", False),
    "get_adapter": (None, "Adapter", False),
    "delete_adapter": (None, "Deleted", False),
    "list_versions": (None, "AdapterVersion", True),
    "activate_version": ("Activation", "Adapter", False),
    "list_keys": (None, "Key", True),
    "create_key": ("NewKey", "CreatedKey", False),
    "change_key": ("KeyChange", "Key", False),
    "revoke_key": (None, "Key", False),
    "list_tenants": (None, "Tenant", True),
    "create_tenant": ("NewTenant", "Tenant", False),
    "get_tenant": (None, "Tenant", False),
    "change_tenant": ("TenantChange", "Tenant", False),
    "delete_tenant": (None, "Deleted", False),
    "list_models": (None, "BaseModel", True),
    "create_model": ("NewBaseModel", "BaseModel", False),
    "get_model": (None, "BaseModel", False),
    "delete_model": (None, "Deleted", False),
    "change_model": ("BaseModelChange", "BaseModel", False),
    "list_replicas": (None, "Replica", True),
    "show_replica": (None, "Replica", False),
    "stop_replica": (None, "StoppingReplica", False),
    "usage_report": (None, "Usage", True),
    "usage_events": (None, "UsageEvent", True),
    "cogs_report": (None, "Cogs", False),
}
CREATED = frozenset({"upload_adapter", "create_key", "create_tenant", "create_model"})
DRY_RUN: Schema = {"type": "boolean", "description": "True: check and answer as without it (with 200), and store nothing."}
QUERIES: dict[str, dict[str, Schema]] = {
    **{name: {"dry_run": DRY_RUN} for name in ("create_tenant", "change_tenant", "create_model", "change_model")},
    "list_replicas": {"ended": {"type": "boolean"}},
    "revoke_key": {"force": {"type": "boolean", "description": "Also the last key of the operators."}},
    "usage_report": {"since": DAY, "until": DAY},
    "usage_events": {"limit": {"type": "integer", "minimum": 1, "maximum": 1000}},
    "cogs_report": {"since": DAY, "until": DAY, "by": {"type": "string", "examples": ["day,tenant", "adapter"]}},
}

#: A request needs one of them.
SECURITY_SCHEMES: dict[str, Schema] = {
    "key": {"type": "http", "scheme": "bearer"},
    "azure_key": {"type": "apiKey", "in": "header", "name": "api-key"},
    "anthropic_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}

IDEMPOTENCY_KEY: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
    "description": (
        "The request runs once: for 24 hours the tenant's other requests with this key and the same body get the same answer, with the "
        "header `idempotency-replayed: true`, at no cost. What failed, or was not read to its end, is not kept, and runs anew."
    ),
}
CONFLICT: dict[str, Any] = {
    "409": {
        "description": (
            "Nothing runs for this Idempotency-Key: its request is still running (`idempotency_in_progress`: try again), it was another "
            "one (`idempotency_mismatch`), or its answer was too large to be kept (`idempotency_answer_too_large`)."
        ),
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
}


def document(operations: list[tuple[str, str, Callable[..., Any]]]) -> dict[str, Any]:
    """The document for these operations (method, path, handler) and OpenAI's endpoints. Raises KeyError for one without a shape."""
    paths: dict[str, dict[str, Any]] = {}
    for method, path, handler in operations:
        name = handler.__name__
        takes, gives, is_list = SHAPES[name]
        operation: dict[str, Any] = {
            "operationId": f"{'operator' if path.startswith('/admin') else 'tenant'}_{name}{'_of_tenant' if '{tenant}/' in path else ''}",
            "summary": (handler.__doc__ or "").split("\n")[0],
            "tags": ["operator" if path.startswith("/admin") else "tenant"],
            "parameters": _parameters(path, name),
            "responses": _responses(gives, is_list=is_list, status="201" if name in CREATED else "200"),
        }
        if name == "upload_adapter":
            same = {"description": "A version has this content already: this one."}
            operation["responses"]["200"] = operation["responses"]["201"] | same
        if takes is not None:
            media = "multipart/form-data" if takes in ("AdapterUpload", "AdapterCheck") else "application/json"
            operation["requestBody"] = {"required": True, "content": {media: {"schema": _ref(takes)}}}
        paths.setdefault(path, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "lmaas", "version": "1", "description": "Serverless, multi-tenant LLM endpoints."},
        "security": [{name: []} for name in SECURITY_SCHEMES],
        "paths": paths | _openai_paths(),
        "components": {"schemas": SCHEMAS, "securitySchemes": SECURITY_SCHEMES},
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _parameters(path: str, handler: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"name": name, "in": "path", "required": True, "schema": TEXT} for name in re.findall(r"{(\w+)}", path)]
    queries = dict(QUERIES.get(handler, {}))
    if handler.startswith("usage_") and path.startswith("/admin"):
        queries["tenant"] = TEXT
    return found + [{"name": name, "in": "query", "required": False, "schema": schema} for name, schema in queries.items()]


def _responses(gives: str, *, is_list: bool, status: str = "200") -> dict[str, Any]:
    schema = _object(object=TEXT, data={"type": "array", "items": _ref(gives)}) if is_list else _ref(gives)
    return {
        status: {"description": "Done.", "content": {"application/json": {"schema": schema}}},
        "default": {"description": "What went wrong.", "content": {"application/json": {"schema": _ref("Error")}}},
    }


def _openai_paths() -> dict[str, Any]:
    answer = _responses("OpenAIAnswer", is_list=False)
    model = {"name": "model", "in": "path", "required": True, "schema": TEXT}
    common = {"tags": ["openai"]}
    asked = common | {"parameters": [IDEMPOTENCY_KEY], "responses": answer | CONFLICT}

    def body(name: str) -> dict[str, Any]:
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": _ref(name)}}}}

    return {
        "/v1/chat/completions": {"post": asked | body("ChatRequest") | {"operationId": "chat", "summary": "A chat completion."}},
        "/v1/completions": {"post": asked | body("CompletionRequest") | {"operationId": "completion", "summary": "A completion."}},
        "/v1/models": {
            "get": common
            | {"operationId": "models", "summary": "What this tenant may call.", "responses": _responses("Model", is_list=True)}
        },
        "/v1/models/{model}": {
            "get": common
            | {"operationId": "model", "summary": "One model.", "parameters": [model], "responses": _responses("Model", is_list=False)}
        },
    }
