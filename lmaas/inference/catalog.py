"""Resolves a tenant's model name to a pool and an adapter version."""

import functools
import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version as installed_version

from lmaas.adapters.objects import source_of
from lmaas.errors import InvalidRequest, ModelNotFound
from lmaas.inference.cache import Changes, ReadCache
from lmaas.states import PoolKind
from lmaas.store.adapters import ServedAdapter, find_served, list_adapters
from lmaas.store.database import Database
from lmaas.store.models import BaseModel, list_base_models
from lmaas.types import NAME_PATTERN

#: The release, which decides the version of the engines too.
_RELEASE = installed_version("lmaas")
#: A new live version is served after this time at the latest.
FRESH_S = 0.5
GRACE_S = 300.0
_PINNED = re.compile(rf"({NAME_PATTERN.pattern})(?:@([1-9][0-9]{{0,8}}))?")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model behind a name that a tenant calls. `engine_name` is the engine's name for it, `adapter` is empty for a base model.

    `adapter_name` is the tenant's name for the adapter, without a version.
    """

    base: BaseModel
    engine_name: str
    adapter: str
    source: str
    version: int | None
    #: In seconds since 1970.
    created: int
    adapter_name: str = ""

    @property
    def shown(self) -> str:
        """The tenant's name for exactly these weights: that of a base model, or of an adapter with its version, such as `robot@3`."""
        return f"{self.adapter_name}@{self.version}" if self.adapter_name else self.base.name

    @property
    def head_line(self) -> bytes:
        """The header line that names the model in a response. The name has only letters, digits and a few marks."""
        return f"x-lmaas-model: {self.shown}\r\n".encode()

    def check_kind(self, wanted: PoolKind, name: str, path: str) -> None:
        """Raise InvalidRequest if the model's engines do not support the requests to `path`. `name` is that of the request."""
        if self.base.kind is not wanted:
            does = {PoolKind.GENERATE: "generates text", PoolKind.EMBED: "embeds text"}[self.base.kind]
            raise InvalidRequest(
                f"The model '{name}' {does} and cannot serve {path}. GET /v1/models lists the models.",
                code="unsupported_model",
                param="model",
            )

    @property
    def fingerprint(self) -> str:
        """The `system_fingerprint` of this model's answers: it changes when anything changes that can affect them."""
        base = self.base
        return _fingerprint(base.id, base.source, base.dtype, base.max_lora_rank, base.max_model_len, base.engine_args, self.engine_name)


@functools.lru_cache(10_000)
def _fingerprint(*facts: object) -> str:
    return f"fp_{hashlib.sha256(repr((_RELEASE, *facts)).encode()).hexdigest()[:12]}"


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One line of `/v1/models`. `created` is in seconds since 1970, `max_model_len` the context in tokens."""

    name: str
    created: int
    parent: str | None
    max_model_len: int
    kind: PoolKind


class Catalog:
    """The models that each tenant may call: every base model, and its own adapters."""

    def __init__(self, db: Database, changes: Changes | None = None) -> None:
        self._db = db
        self._bases = ReadCache[str, list[BaseModel]](self._list_bases, fresh_s=FRESH_S, grace_s=GRACE_S, changes=changes)
        # The base model is not part of the entry, because an entry that is made from another entry could be as old as both together.
        self._served = ReadCache[tuple[str, str, int | None], ServedAdapter](self._find, fresh_s=FRESH_S, grace_s=GRACE_S, changes=changes)

    async def resolve(self, tenant_id: str, name: str) -> ServedModel:
        """Return the model of a name: a base model, an adapter's live version, or `adapter@version`. Raises ModelNotFound.

        Another tenant's adapter, an engine's internal name and a name that does not exist raise the same error.
        """
        match = _PINNED.fullmatch(name)
        if match is None:
            raise ModelNotFound(name)
        plain, version = match[1], match[2]
        if version is None:
            for base in await self._bases.get("") or ():
                if base.name == plain:
                    return ServedModel(base, base.name, "", "", None, _seconds(base.created_at))
        found = await self._served.get((tenant_id, plain, None if version is None else int(version)))
        bases = {base.id: base for base in await self._bases.get("") or ()}
        if found is None or found.base_model_id not in bases:
            raise ModelNotFound(name)
        base = bases[found.base_model_id]
        # A name always stands for the same weights, because the engine keys its prefix cache by the name.
        adapter = f"{tenant_id}-{found.content_hash}"
        source = source_of(tenant_id, found.content_hash)
        return ServedModel(base, adapter, adapter, source, found.version, _seconds(found.created_at), plain)

    async def listed(self, tenant_id: str, *, adapters: bool = True) -> list[ListedModel]:
        """Return every model that the tenant may call by its plain name, or the base models only."""
        bases = await self._bases.get("") or ()
        listed = [ListedModel(base.name, _seconds(base.created_at), None, base.max_model_len, base.kind) for base in bases]
        if not adapters:
            return listed
        by_name = {base.name: base for base in bases}
        for adapter in await list_adapters(self._db, tenant_id):
            # A new base model may not be in the cache yet. Its adapters are listed as soon as it is.
            base = by_name.get(adapter.base_model)
            if adapter.live_version is not None and base is not None:
                listed.append(ListedModel(adapter.name, _seconds(adapter.created_at), base.name, base.max_model_len, base.kind))
        return listed

    async def _list_bases(self, _: str) -> list[BaseModel] | None:
        return await list_base_models(self._db)

    async def _find(self, key: tuple[str, str, int | None]) -> ServedAdapter | None:
        tenant_id, name, version = key
        return await find_served(self._db, tenant_id, name, version)


def _seconds(moment: datetime | None) -> int:
    return 0 if moment is None else int(moment.timestamp())
