"""Small values that several packages share."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

#: Names of tenants, base models and adapters: lower case, so that few names look alike; no `@`, which pins a version.
NAME_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")


#: The prefixes of ids. Names of base models and tenants must not begin with them, so that either can be found by its id or its name.
MODEL_ID_PREFIX = "mod_"
TENANT_ID_PREFIX = "ten_"

#: 4,000 $. The charge of a request of 900 million tokens, at the price of `priority`, fits the ledger's BIGINT, and the 14 digits of
#: Lua's JSON hold a price.
MAX_PRICE = 4 * 10**9

#: A dtype that is chosen on the machine where an engine starts.
AUTO = "auto"


def is_model_name(name: str) -> bool:
    """Return whether a base model may have this name."""
    return NAME_PATTERN.fullmatch(name) is not None and not name.startswith(MODEL_ID_PREFIX)


class Role(StrEnum):
    """The permissions of a key."""

    OPERATOR = "operator"
    TENANT_ADMIN = "tenant_admin"
    INFERENCE = "inference"


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a tenant or a key. None means no limit of its own. The budget is in micro-dollars.

    Months are calendar months, UTC; concurrent requests are those that wait or run.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    tokens_per_month: int | None = None
    budget_per_month: int | None = None


@dataclass(frozen=True, slots=True)
class Quota:
    """The files that a tenant may have, and their bytes. `of` is the owner of the quota, for messages."""

    files: int
    size_bytes: int
    of: str


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """The simultaneous work of a tenant: batches that have not ended, and lines that wait or run in them. `of` is the owner of the limits,
    for messages."""

    batches: int
    lines: int
    of: str


@dataclass(frozen=True, slots=True)
class Principal:
    """The authenticated tenant and key. An operator's key has no tenant. Where a tenant's limit is None, that of its tier holds.

    A session acts for the key that it was made from: `key_id` is that key's. One that was made for a named person acts for itself.
    """

    key_id: str
    role: Role
    tenant_id: str | None
    tenant_name: str | None
    max_queued: int = 0
    tier: str = ""
    limits: Limits = Limits()
    key_limits: Limits = Limits()
    #: When the key ends, in seconds since 1970.
    expires_at: float | None = None
    #: The id of the session, if the credential is one.
    session_id: str | None = None

    def has_expired(self, now: float) -> bool:
        """Return whether the key has ended at this time, in seconds since 1970."""
        return self.expires_at is not None and now >= self.expires_at


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources that a replica takes from a machine, or that machines offer: CPUs, and whole accelerators."""

    cpus: float
    accelerators: int


class TokenCounts(NamedTuple):
    """The tokens that one request has used so far, by the engine's own figures; `cached` ones are part of the prompt's."""

    prompt: int
    cached: int
    completion: int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a safetensors file, as its header describes it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BaseModelShapes:
    """The properties of a base model that an adapter must fit.

    `linears` maps a module path such as `model.layers.0.self_attn.q_proj` to `(out_features, in_features)`;
    `dtype` is the engine's dtype (`float32`, `bfloat16`, `float16`), in which weights must stay finite.
    """

    linears: dict[str, tuple[int, int]]
    dtype: str
    max_lora_rank: int
