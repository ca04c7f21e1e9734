"""Makes the service match the manifests of a folder, through its API; may be run again at any time."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lmaas.errors import ApiError, InvalidRequest
from lmaas.manifests.client import ApiClient
from lmaas.manifests.files import Change, check, load, yaml_files
from lmaas.manifests.models import ModelManifest, apply_model
from lmaas.types import Limits

LIMITS = ("max_queued", "max_adapters", *(field.name for field in fields(Limits)))


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """An adapter of a tenant: `folder` is as PEFT saves it."""

    name: str
    base_model: str
    folder: Path


@dataclass(frozen=True, slots=True)
class TenantManifest:
    """One tenant as code. Limits that are not given are the service's."""

    name: str
    settings: dict[str, Any]
    adapters: list[AdapterManifest]


def read(path: Path) -> TenantManifest:
    """Raises InvalidRequest, naming the file and what is wrong in it."""
    content = load(path)
    check(path, content, {"name": str, "tier": str, "limits": dict, "adapters": list}, required=("name",))
    limits = content.get("limits", {})
    check(path, limits, dict.fromkeys(LIMITS, int), where="limits.")
    adapters = []
    for index, entry in enumerate(content.get("adapters", [])):
        fields = {"name": str, "base_model": str, "path": str}
        check(path, entry, fields, required=tuple(fields), where=f"adapters[{index}].")
        adapters.append(AdapterManifest(entry["name"], entry["base_model"], path.parent / entry["path"]))
    settings = dict(limits) | ({"tier": content["tier"]} if "tier" in content else {})
    return TenantManifest(content["name"], settings, adapters)


def read_folder(folder: Path) -> list[TenantManifest]:
    """Every manifest of a folder (or the one file), by file name. Raises InvalidRequest."""
    if folder.is_file():
        return [read(folder)]
    if not folder.is_dir():
        raise InvalidRequest(f"There is no folder {folder}.")
    return [read(path) for path in yaml_files(folder)]


def apply(manifests: list[TenantManifest], client: ApiClient, models: Sequence[ModelManifest] = ()) -> list[Change]:
    """Make the service match, base models first; `client` has an operator's key. What a manifest does not name stays as it is.

    Raises ApiError.
    """
    changes = [apply_model(model, client) for model in models]
    for manifest in manifests:
        changes.append(_apply_tenant(manifest, client))
        for adapter in manifest.adapters:
            path = f"/admin/v1/tenants/{manifest.name}/adapters"
            before = {entry["name"]: entry["live_version"] for entry in client.list(path)}
            answer = client.for_tenant(manifest.name).upload(adapter.name, adapter.base_model, adapter.folder)
            outcome = "created" if adapter.name not in before else "changed" if before[adapter.name] != answer["version"] else "unchanged"
            changes.append(Change("adapter", f"{manifest.name}/{adapter.name}@{answer['version']}", outcome))
    return changes


def _apply_tenant(manifest: TenantManifest, client: ApiClient) -> Change:
    address = f"/admin/v1/tenants/{manifest.name}"
    try:
        known = client.call("GET", address)
    except ApiError as error:
        if error.status != 404:
            raise
        client.call("POST", "/admin/v1/tenants", json={"name": manifest.name, **manifest.settings})
        return Change("tenant", manifest.name, "created")
    if all(known[name] == value for name, value in manifest.settings.items()):
        return Change("tenant", manifest.name, "unchanged")
    client.call("PATCH", address, json=manifest.settings)
    return Change("tenant", manifest.name, "changed")


def working_keys(tenant: str, known: dict[str, str], client: ApiClient) -> dict[str, str]:
    """A tenant's `api_key` and `admin_key`: the known ones if they work, otherwise new ones."""
    keys = {}
    for field, role in (("api_key", "inference"), ("admin_key", "tenant_admin")):
        key = known.get(field)
        if not key or not client.with_key(key).works():
            path = f"/admin/v1/tenants/{tenant}/keys"
            key = str(client.call("POST", path, json={"role": role, "name": "lmaas up"})["key"])
        keys[field] = key
    return keys
