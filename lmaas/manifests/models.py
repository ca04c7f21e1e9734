"""Manifests of base models: `models/*.yaml` beside those of the tenants."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmaas.manifests.files import checked, load, refusing

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
PLAIN: dict[str, type] = {"name": str, "source": str, "kind": str, "dtype": str, "idle_timeout_s": float}
#: The API's name of every value → the manifest's.
FIELDS = {name: name for name in PLAIN if name != "name"} | {
    api_name: f"{section}.{name}" for section, fields in SECTIONS.items() for name, (_, api_name) in fields.items()
}


@dataclass(frozen=True, slots=True)
class ModelManifest:
    """One base model as code. `values` has the API's names; a value that is not given is the service's default."""

    path: Path
    name: str
    values: dict[str, Any]

    @property
    def body(self) -> dict[str, Any]:
        """Every value that a manifest may give; null for the default."""
        return {name: self.values.get(name) for name in FIELDS}


def read_model(path: Path) -> ModelManifest:
    """Read one manifest. Raises InvalidRequest, naming the file and what is wrong in it."""
    content = checked(path, load(path), PLAIN | dict.fromkeys(SECTIONS, dict), required=("name", "source"))
    values = {name: content[name] for name in PLAIN if name in content and name != "name"}
    if values["source"].startswith((".", "/", "~")):
        # A folder, relative to the manifest; anything else is a hub's name.
        with refusing(path, "source"):
            values["source"] = str((path.parent / Path(values["source"]).expanduser()).resolve())
    for section, fields in SECTIONS.items():
        given = checked(path, content.get(section, {}), {name: kind for name, (kind, _) in fields.items()}, where=f"{section}.")
        values |= {fields[name][1]: value for name, value in given.items()}
    return ModelManifest(path, content["name"], values)
