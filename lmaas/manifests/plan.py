"""The plan: what applying manifests would change, computed from the manifests and from what the service has now."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from lmaas.api import table
from lmaas.api.operation import Operation
from lmaas.errors import InvalidRequest
from lmaas.manifests import models, tenants
from lmaas.manifests.folder import Manifests
from lmaas.manifests.models import ModelManifest
from lmaas.manifests.tenants import AdapterManifest, TenantManifest

#: A base model or a tenant as the API shows it.
Shown = dict[str, Any]


@dataclass(frozen=True, slots=True)
class KnownAdapter:
    """An adapter of the service. `contents` maps each version to its content hash; it is read only where a manifest has the adapter.

    `is_tenants` is true if a key of the tenant itself made the live version live.
    """

    base_model: str
    live_version: int | None
    contents: Mapping[int, str] = field(default_factory=dict)
    is_tenants: bool = False


@dataclass(frozen=True, slots=True)
class Observed:
    """The present state of the service, the results of the manifests, and the reasons for which it would refuse some.

    Base models and tenants are by name, adapters by tenant and name, hashes of folders by tenant and adapter. `refusals` are messages.
    """

    models: Mapping[str, Shown] = field(default_factory=dict)
    tenants: Mapping[str, Shown] = field(default_factory=dict)
    adapters: Mapping[str, Mapping[str, KnownAdapter]] = field(default_factory=dict)
    proposed_models: Mapping[str, Shown] = field(default_factory=dict)
    proposed_tenants: Mapping[str, Shown] = field(default_factory=dict)
    contents: Mapping[tuple[str, str], str] = field(default_factory=dict)
    refusals: tuple[str, ...] = ()


class Outcome(StrEnum):
    """The outcome for one thing."""

    CREATED = "created"
    CHANGED = "changed"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class FieldChange:
    """One value that changes; None is a value that is not set. With `is_new` it is a value of something that is created."""

    field: str
    old: Any
    new: Any
    is_new: bool = False


@dataclass(frozen=True, slots=True)
class Send:
    """A call of an operation with a JSON body. `path` has the parameters of its path."""

    operation: Operation
    body: dict[str, Any]
    path: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload of an adapter's folder, which becomes `version`."""

    tenant: str
    adapter: str
    base_model: str
    folder: Path
    version: int
    activate: bool


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one base model, tenant or adapter, and the requests that make it. `notes` are sentences for people."""

    thing: str
    name: str
    outcome: Outcome
    path: Path
    fields: tuple[FieldChange, ...] = ()
    requests: tuple[Send | Upload, ...] = ()
    notes: tuple[str, ...] = ()


def plan(manifests: Manifests, observed: Observed) -> list[Change]:
    """Return the changes in the order in which they have to be made: base models, then each tenant with its adapters.

    Raises InvalidRequest with a line for everything that would be refused, by file.
    """
    problems = sorted([*observed.refusals, *_problems(manifests, observed)])
    if problems:
        raise InvalidRequest("\n".join(problems))
    changes = [_resource(model, observed.models.get(model.name), observed.proposed_models[model.name]) for model in manifests.models]
    for tenant in manifests.tenants:
        known = observed.adapters.get(tenant.name, {})
        change = _resource(tenant, observed.tenants.get(tenant.name), observed.proposed_tenants[tenant.name], _unmanaged(tenant, known))
        changes += [change, *(_adapter(tenant, entry, known.get(entry.name), observed) for entry in tenant.adapters)]
    return changes


def request_for(manifest: ModelManifest | TenantManifest, *, exists: bool) -> Send:
    """Return the request that makes the service match. It has every value that a manifest may give, so that a removed one is a default."""
    is_model = isinstance(manifest, ModelManifest)
    if exists:
        operation, parameter = (table.CHANGE_MODEL, "model") if is_model else (table.CHANGE_TENANT, "tenant")
        return Send(operation, manifest.body, {parameter: manifest.name})
    return Send(table.CREATE_MODEL if is_model else table.CREATE_TENANT, {"name": manifest.name} | manifest.body)


def _resource(manifest: ModelManifest | TenantManifest, known: Shown | None, proposed: Shown, notes: tuple[str, ...] = ()) -> Change:
    thing, words = ("base model", models.FIELDS) if isinstance(manifest, ModelManifest) else ("tenant", tenants.FIELDS)
    request = request_for(manifest, exists=known is not None)
    if known is None:
        given = tuple(FieldChange(word, None, proposed[name], True) for name, word in words.items() if manifest.body[name] is not None)
        return Change(thing, manifest.name, Outcome.CREATED, manifest.path, given, (request,), notes)
    changed = tuple(FieldChange(word, known[name], proposed[name]) for name, word in words.items() if known[name] != proposed[name])
    if not changed:
        return Change(thing, manifest.name, Outcome.UNCHANGED, manifest.path, notes=notes)
    return Change(thing, manifest.name, Outcome.CHANGED, manifest.path, changed, (request,), notes)


def _unmanaged(tenant: TenantManifest, known: Mapping[str, KnownAdapter]) -> tuple[str, ...]:
    others = sorted(known.keys() - {entry.name for entry in tenant.adapters})
    return (f"Not in the manifest, left as they are: {', '.join(others)}.",) if others else ()


def _adapter(tenant: TenantManifest, entry: AdapterManifest, known: KnownAdapter | None, observed: Observed) -> Change:
    """A folder whose content no version has becomes a version. It becomes live, unless the manifest pins another or the tenant itself has
    made one live. A version that is live already is replaced for no other reason."""
    contents = {} if known is None else known.contents
    live = None if known is None else known.live_version
    same = _versions_of(entry, tenant, contents, observed)
    folder = None if same else entry.folder
    new = _next(contents)
    stays = live is not None and known is not None and known.is_tenants
    wanted = entry.version or (new if folder and not stays else live or max(same))
    requests: list[Send | Upload] = []
    fields: list[FieldChange] = []
    notes: list[str] = []
    if folder:
        requests.append(Upload(tenant.name, entry.name, entry.base_model, folder, new, activate=entry.version is None and not stays))
    if folder and wanted != new:
        fields.append(FieldChange("latest version", max(contents, default=None), new))
    if wanted != live:
        fields.append(FieldChange("live version", live, wanted))
        if entry.version or not folder:
            requests.append(Send(table.ACTIVATE_VERSION, {"version": wanted}, {"tenant": tenant.name, "name": entry.name}))
    elif live not in same and entry.version is None:
        mine = new if folder else max(same)
        by = "by the tenant's own choice " if stays else ""
        notes.append(
            f"Version {live} is live {by}and stays so; the folder has the content of version {mine}. "
            f"To serve that one, set 'version: {mine}' in the manifest or activate it."
        )
    outcome = Outcome.CREATED if known is None else Outcome.CHANGED if requests else Outcome.UNCHANGED
    return Change("adapter", f"{tenant.name}/{entry.name}", outcome, tenant.path, tuple(fields), tuple(requests), tuple(notes))


def _versions_of(entry: AdapterManifest, tenant: TenantManifest, contents: Mapping[int, str], observed: Observed) -> list[int]:
    """Return the versions that have the content of the entry's folder."""
    mine = observed.contents.get((tenant.name, entry.name))
    return [version for version, content in contents.items() if content == mine]


def _needs_upload(tenant: TenantManifest, entry: AdapterManifest, known: Mapping[str, KnownAdapter], observed: Observed) -> bool:
    contents = known[entry.name].contents if entry.name in known else {}
    return entry.folder is not None and not _versions_of(entry, tenant, contents, observed)


def _next(contents: Mapping[int, str]) -> int:
    return max(contents, default=0) + 1


def _problems(manifests: Manifests, observed: Observed) -> Iterator[str]:
    """Return the refusals of the service that concern manifests which are right by themselves."""
    new_models = {model.name: model.path for model in manifests.models}
    ids = {row["id"]: name for known in (observed.models, observed.tenants) for name, row in known.items()}
    given = [(manifest.path, manifest.name) for manifest in manifests.models]
    for path, name in (*given, *((manifest.path, manifest.name) for manifest in manifests.tenants)):
        if name in ids:
            yield f"{path}: 'name' is the id of '{ids[name]}'. Give the name instead."
    for tenant in manifests.tenants:
        known = observed.adapters.get(tenant.name, {})
        for entry in tenant.adapters:
            for problem in _adapter_problems(tenant, entry, known.get(entry.name), observed, new_models):
                yield f"{tenant.path}: {problem}"
        limit = observed.proposed_tenants.get(tenant.name, {}).get("max_adapters")
        names = known.keys() | {entry.name for entry in tenant.adapters}
        if limit is not None and len(names) > limit and any(_needs_upload(tenant, entry, known, observed) for entry in tenant.adapters):
            yield (
                f"{tenant.path}: The tenant would have {len(names)} adapters, of which {len(known)} exist, but 'limits.max_adapters' is "
                f"{limit}. Raise it, or delete adapters."
            )


def _adapter_problems(
    tenant: TenantManifest, entry: AdapterManifest, known: KnownAdapter | None, observed: Observed, new_models: Mapping[str, Path]
) -> Iterator[str]:
    if entry.base_model not in observed.models and entry.base_model not in new_models:
        yield f"'{entry.where}.base_model': there is no base model '{entry.base_model}', neither in the service nor in a manifest."
        return
    if entry.name in observed.models or entry.name in new_models:
        yield f"'{entry.where}.name': '{entry.name}' is the name of a base model. Choose another name."
    if known is not None and known.base_model != entry.base_model:
        yield (
            f"'{entry.where}.base_model' is '{entry.base_model}', but the adapter '{entry.name}' exists and is for '{known.base_model}'. "
            "Choose another name, or delete that adapter first."
        )
        return
    contents = {} if known is None else known.contents
    possible = set(contents)
    if entry.folder is not None and not _versions_of(entry, tenant, contents, observed):
        possible.add(_next(contents))
    if entry.version is not None and entry.version not in possible:
        there = f"It has: {', '.join(str(version) for version in sorted(contents))}." if contents else "It has none."
        yield f"'{entry.where}.version': the adapter '{entry.name}' has no version {entry.version}. {there}"
