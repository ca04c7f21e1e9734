"""Manifests of tenants: their tier, limits and adapters."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lmaas.adapters.config import CONFIG_FILE
from lmaas.adapters.safetensors import MODEL_FILE
from lmaas.errors import InvalidRequest
from lmaas.manifests.files import checked, load, refusing
from lmaas.types import NAME_PATTERN, Limits

#: Limits for which 0 means none of the tenant's own, as in the CLI. The tier's then holds.
CLEARABLE = tuple(field.name for field in fields(Limits))
LIMITS = ("max_queued", "max_adapters", *CLEARABLE)
#: The API's name of every setting → the manifest's.
FIELDS = {"tier": "tier"} | {name: f"limits.{name}" for name in LIMITS}
_ADAPTER = {"name": str, "base_model": str, "path": str, "version": int}


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """An adapter of a tenant.

    `folder` is as PEFT saves it; None if the manifest only pins a version. `version` is the one to be live; None leaves that to uploads and
    to people. `where` is the entry's place in the file.
    """

    name: str
    base_model: str
    folder: Path | None
    version: int | None
    where: str


@dataclass(frozen=True, slots=True)
class TenantManifest:
    """One tenant as code. A setting that is not given is the service's default."""

    path: Path
    name: str
    settings: dict[str, Any]
    adapters: tuple[AdapterManifest, ...]

    @property
    def body(self) -> dict[str, Any]:
        """Every setting that a manifest may give; null for the default."""
        return {name: self.settings.get(name) for name in FIELDS}


def read_tenant(path: Path) -> TenantManifest:
    """Read one manifest and look at the folders of its adapters. Raises InvalidRequest, naming the file and what is wrong."""
    content = checked(path, load(path), {"name": str, "tier": str, "limits": dict, "adapters": list}, required=("name",))
    settings = checked(path, content.get("limits", {}), dict.fromkeys(LIMITS, int), where="limits.")
    settings = {name: value for name, value in settings.items() if value != 0 or name not in CLEARABLE}
    if "tier" in content:
        settings["tier"] = content["tier"]
    adapters: dict[str, AdapterManifest] = {}
    for index, entry in enumerate(content.get("adapters", [])):
        adapter = _read_adapter(path, entry, f"adapters[{index}]")
        if adapter.name in adapters:
            first = adapters[adapter.name].where
            raise InvalidRequest(f"{path}: '{first}' and '{adapter.where}' are both named '{adapter.name}'. Remove one, or rename it.")
        adapters[adapter.name] = adapter
    return TenantManifest(path, content["name"], settings, tuple(adapters.values()))


def _read_adapter(path: Path, entry: Any, where: str) -> AdapterManifest:
    given = checked(path, entry, _ADAPTER, required=("name", "base_model"), where=f"{where}.")
    if NAME_PATTERN.fullmatch(given["name"]) is None:
        raise InvalidRequest(
            f"{path}: '{where}.name' is '{given['name'][:100]}'. An adapter's name has 1 to 63 lower-case letters, digits, '.', '_' or "
            "'-', and starts and ends with a letter or digit."
        )
    if "path" not in given and "version" not in given:
        raise InvalidRequest(f"{path}: '{where}.path' is missing. Give the adapter's folder, or the version of it that is to be live.")
    if given.get("version", 1) < 1:
        raise InvalidRequest(f"{path}: '{where}.version' must be 1 or more, not {given['version']}.")
    folder = None
    if "path" in given:
        with refusing(path, f"{where}.path"):
            folder = path.parent / Path(given["path"]).expanduser()
            _check_folder(path, folder, where)
    return AdapterManifest(given["name"], given["base_model"], folder, given.get("version"), where)


def _check_folder(path: Path, folder: Path, where: str) -> None:
    if not folder.is_dir():
        raise InvalidRequest(f"{path}: '{where}.path': there is no folder {folder}.")
    for name in (CONFIG_FILE, MODEL_FILE):
        try:
            if (folder / name).exists() and not (folder / name).is_file():
                raise InvalidRequest(f"{path}: '{where}.path': {folder / name} is not a regular file.")
            with (folder / name).open("rb"):
                pass
        except OSError as error:
            raise InvalidRequest(
                f"{path}: '{where}.path': {folder / name} cannot be read: {error.strerror}. "
                "Save the adapter with PEFT's save_pretrained(..., safe_serialization=True)."
            ) from error
