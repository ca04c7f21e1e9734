"""Creates rows for tests that need a database with contents."""

import json
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import insert

from lmaas.audit import Audit
from lmaas.states import UsageStatus
from lmaas.store.adapters import add_version
from lmaas.store.database import Database
from lmaas.store.models import BaseModel, put_base_model
from lmaas.store.responses import Response
from lmaas.store.scopes import SYSTEM
from lmaas.store.tables import batch_pools, batches, job_runners
from lmaas.store.tenants import Tenant, create_tenant
from lmaas.store.usage import UsageEvent


async def base_model(db: Database, name: str = "base", **changes: Any) -> BaseModel:
    """Create a base model with two slots per replica."""
    values: dict[str, Any] = {
        "id": "",
        "name": name,
        "source": "/models/base",
        "dtype": "float32",
        "linears": {"model.layers.0.self_attn.q_proj": [64, 32]},
        "max_lora_rank": 16,
        "max_loras": 2,
        "max_cpu_loras": 4,
        "max_num_seqs": 2,
        "max_model_len": 2048,
        "kv_cache_bytes": 2**30,
        "engine_args": "",
    }
    return await put_base_model(db, BaseModel(**values | changes))


async def tenant(db: Database, name: str, max_adapters: int = 5) -> Tenant:
    """Create a tenant."""
    return await create_tenant(db, name, "standard", 10, max_adapters)


async def upload(
    db: Database,
    tenant_id: str,
    name: str,
    base: BaseModel,
    *,
    content: str | None = None,
    activate: bool = True,
    validated: BaseModel | None = None,
    audit: Audit | None = None,
) -> int:
    """Add a version of an adapter, with unique content if none is given."""
    uploaded = await add_version(
        db,
        tenant_id,
        name,
        base.id,
        content_hash=content or secrets.token_hex(32),
        rank=8,
        target_modules=["q_proj"],
        size_bytes=1000,
        activate=activate,
        validated=validated,
        audit=audit,
    )
    return uploaded.version.version


def usage_event(request_id: str, tenant_id: str | None, **changes: Any) -> UsageEvent:
    """Return the usage event of a request."""
    values: dict[str, Any] = {
        "request_id": request_id,
        "tenant_id": tenant_id,
        "key_id": None,
        "base_model": "base",
        "model": "base",
        "adapter": None,
        "adapter_version": None,
        "status": UsageStatus.COMPLETED,
        "code": None,
        "stream": False,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 5,
        "queue_ms": 1,
        "load_ms": 2,
        "run_ms": 300,
        "replica_id": "rep_1",
        "created_at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    }
    return UsageEvent(**values | changes)


def stored_response(response_id: str, inputs: int = 1) -> Response:
    """Return a response to this many messages, `msg_1` and so on, as the protocol makes it."""
    given = [
        {
            "id": f"msg_{number}",
            "type": "message",
            "role": "user",
            "status": "completed",
            "content": [{"type": "input_text", "text": f"q{number}"}],
        }
        for number in range(1, inputs + 1)
    ]
    nothing = (
        *("error", "incomplete_details", "conversation", "instructions", "max_output_tokens", "max_tool_calls", "previous_response_id"),
        *("prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user", "usage"),
    )
    body: dict[str, Any] = dict.fromkeys(nothing) | {"id": response_id, "object": "response", "created_at": 1, "completed_at": 2}
    body |= {"status": "completed", "output": [], "background": False, "frequency_penalty": 0, "presence_penalty": 0, "metadata": {}}
    body |= {"model": "base", "parallel_tool_calls": True, "reasoning": {}, "service_tier": "default", "store": True, "temperature": 1}
    body |= {"text": {}, "tool_choice": "auto", "tools": [], "top_logprobs": 0, "top_p": 1, "truncation": "disabled"}
    return Response(response_id, json.dumps(given).encode(), json.dumps(body).encode())


async def waiting_batch(
    db: Database,
    owner: Tenant,
    *,
    due_s: float,
    pools: Mapping[str, tuple[int, int]],
    status: str = "in_progress",
    runner_seen_s_ago: float | None = None,
) -> str:
    """Add a batch with so many waiting lines and estimated tokens by pool, and a job runner if it was seen. Returns the batch's id."""
    batch_id = f"batch_{secrets.token_hex(8)}"
    now = datetime.now(UTC)
    async with db.begin(SYSTEM) as connection:
        await connection.execute(
            insert(batches).values(
                tenant_id=owner.id,
                id=batch_id,
                dialect="openai",
                endpoint="/v1/chat/completions",
                key_id="key_1",
                completion_window="24h",
                metadata=b"{}",
                status=status,
                expires_at=now + timedelta(seconds=due_s),
            )
        )
        rows = [
            {"tenant_id": owner.id, "batch_id": batch_id, "pool_id": pool_id, "pending": lines, "pending_tokens": tokens}
            for pool_id, (lines, tokens) in pools.items()
        ]
        await connection.execute(insert(batch_pools), rows)
        if runner_seen_s_ago is not None:
            seen_at = now - timedelta(seconds=runner_seen_s_ago)
            await connection.execute(insert(job_runners).values(id=f"run_{batch_id}", seen_at=seen_at))
    return batch_id
