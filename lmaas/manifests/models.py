"""Base models as code: `models/*.yaml` beside the tenants' manifests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmaas.errors import ApiError
from lmaas.manifests.client import ApiClient
from lmaas.manifests.files import Change, check, load, yaml_files

FOLDER = "models"
#: Section → its fields → the API's names for them.
SECTIONS: dict[str, dict[str, tuple[type, str]]] = {
    "replicas": {"min": (int, "min_replicas"), "max": (int, "max_replicas")},
    "needs": {"cpus": (float, "cpus"), "accelerators": (int, "accelerators")},
    "engine": {
        **{name: (int, name) for name in ("max_loras", "max_lora_rank", "max_cpu_loras", "max_num_seqs", "max_model_len")},
        "kv_cache_bytes": (int, "kv_cache_bytes"),
        "args": (str, "engine_args"),
    },
    "prices": {name: (int, f"{name}_price") for name in ("prompt", "cached", "completion", "engine")},
}
PLAIN: dict[str, type] = {"name": str, "source": str, "dtype": str, "idle_timeout_s": float}


@dataclass(frozen=True, slots=True)
class ModelManifest:
    """One base model as code: `values` are the API's fields. What is not given is the service's."""

    name: str
    values: dict[str, Any]


def read_model(path: Path) -> ModelManifest:
    """Raises InvalidRequest, naming the file and what is wrong in it."""
    content = load(path)
    check(path, content, PLAIN | dict.fromkeys(SECTIONS, dict), required=("name", "source"))
    values = {name: content[name] for name in PLAIN if name in content and name != "name"}
    if values["source"].startswith((".", "/", "~")):
        # A folder, beside the manifest; anything else is a hub's name.
        values["source"] = str((path.parent / Path(values["source"]).expanduser()).resolve())
    for section, fields in SECTIONS.items():
        given = content.get(section, {})
        check(path, given, {name: kind for name, (kind, _) in fields.items()}, where=f"{section}.")
        values |= {fields[name][1]: value for name, value in given.items()}
    return ModelManifest(content["name"], values)


def read_models(folder: Path) -> list[ModelManifest]:
    """Every base model of a folder of manifests, by file name. Raises InvalidRequest."""
    return [read_model(path) for path in yaml_files(folder / FOLDER)]


def apply_model(manifest: ModelManifest, client: ApiClient) -> Change:
    """Make the service match; `client` has an operator's key. What the manifest does not name stays as it is. Raises ApiError."""
    address = f"/admin/v1/base-models/{manifest.name}"
    try:
        known = client.call("GET", address)
    except ApiError as error:
        if error.status != 404:
            raise
        client.call("POST", "/admin/v1/base-models", json={"name": manifest.name, **manifest.values})
        return Change("base model", manifest.name, "created")
    wanted = {name: value for name, value in manifest.values.items() if known[name] != value}
    # The service may say the same in other words (`dtype: auto`).
    after = client.call("PATCH", address, json=wanted) if wanted else known
    changed = any(after[name] != known[name] for name in wanted)
    return Change("base model", manifest.name, "changed" if changed else "unchanged")
