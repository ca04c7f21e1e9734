"""The tenants and adapters of a run, created for it or found, and the popularity of each."""

import json
import random
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmaas.adapters.config import CONFIG_FILE
from lmaas.adapters.safetensors import MODEL_FILE, base_model_shapes
from lmaas.api import table
from lmaas.errors import SettingsError
from loadtest.service import Service

RANK = 8
LEAVES = ("q_proj", "v_proj")
#: The names of tenants that load tests create.
NAME = re.compile(r"load-\d{3,}")
#: The tenant of a key that is not an operator's.
OWN = "own"
#: The tenants of an existing service that a run calls, at most.
MAX_TENANTS = 200


@dataclass(frozen=True, slots=True)
class Target:
    """A model that a tenant may call: one of its adapters, or the base model."""

    tenant: str
    key: str
    model: str
    is_adapter: bool

    @property
    def kind(self) -> str:
        """Its name in the report."""
        return "adapter" if self.is_adapter else "base"


class Population:
    """All targets by popularity. The target of rank r is called in proportion to 1/r**s (Zipf's law).

    Ranks are assigned with a fixed seed, so every run of the same size has the same favourites.
    """

    def __init__(self, targets: Sequence[Target], s: float) -> None:
        self.targets = random.Random(0).sample(list(targets), len(targets))
        self._weights = [1 / rank**s for rank in range(1, len(targets) + 1)]

    def choose(self, chance: random.Random, tenants: Sequence[str] | None = None) -> Target:
        """Return a random target, of the given tenants if there are any."""
        places = [place for place, target in enumerate(self.targets) if tenants is None or target.tenant in tenants]
        weights = [self._weights[place] for place in places]
        return self.targets[chance.choices(places, weights)[0]]

    @property
    def tenants(self) -> list[str]:
        """The tenants' names, in order."""
        return sorted({target.tenant for target in self.targets})


def found(service: Service, undo: ExitStack) -> list[Target]:
    """Return the models that exist: of the given tenant's key, of the tenants in the credentials file, or, with an operator's key, of the
    tenants with adapters. These get keys for the run, which `undo` revokes. Raises SettingsError if there are none.
    """
    keys = service.keys
    if not service.is_operator:
        keys = {OWN: service.key}
    elif not keys:
        keys = dict(_temporary_keys(service, undo))
    targets = []
    for tenant, key in keys.items():
        targets += [Target(tenant, key, adapter, is_adapter=True) for adapter in _adapters(service, tenant, key)]
        targets.append(Target(tenant, key, service.model, is_adapter=False))
    if not targets:
        raise SettingsError("The service has no tenants with adapters. Have some made: --tenants 8.")
    return targets


def _adapters(service: Service, tenant: str, key: str) -> list[str]:
    """Return the names of a tenant's adapters that can be called."""
    if not service.is_operator:
        rows = [(row["id"], row["parent"]) for row in service.models(key) if row["parent"] is not None]
    else:
        listed = service.operator.items(table.LIST_ADAPTERS, tenant=tenant)
        rows = [(row["name"], row["base_model"]) for row in listed if row["live_version"] is not None]
    return [name for name, parent in rows if not service.is_named or parent == service.model]


def _temporary_keys(service: Service, undo: ExitStack) -> Iterator[tuple[str, str]]:
    """Create a key for each tenant with adapters, of MAX_TENANTS at most."""
    count = 0
    for row in service.operator.items(table.LIST_TENANTS):
        if count == MAX_TENANTS:
            return
        owner = service.operator.for_tenant(row["id"])
        if owner.items(table.LIST_ADAPTERS, most=1):
            made = owner.send(table.CREATE_KEY, {"role": "inference", "name": "load test"})
            undo.callback(owner.send, table.REVOKE_KEY, key=made["id"])
            count += 1
            yield row["name"], made["key"]


def make(service: Service, tenants: int, adapters: int) -> list[Target]:
    """Create tenants with adapters, after removing those of an interrupted run. Raises SettingsError, ApiError."""
    targets = []
    remove(service)
    with tempfile.TemporaryDirectory() as scratch:
        folders = list(_written(Path(service.source), Path(scratch), adapters))
        for number in range(tenants):
            name = f"load-{number:03d}"
            service.operator.send(table.CREATE_TENANT, {"name": name, "max_adapters": max(1, adapters)})
            owner = service.operator.for_tenant(name)
            key = owner.send(table.CREATE_KEY, {"role": "inference", "name": "load test"})["key"]
            for folder in folders:
                owner.upload(folder.name, service.model, folder)
                targets.append(Target(name, key, folder.name, is_adapter=True))
            targets.append(Target(name, key, service.model, is_adapter=False))
    return targets


def remove(service: Service) -> None:
    """Remove every tenant that a load test has created, with its keys and adapters."""
    for row in service.operator.items(table.LIST_TENANTS):
        if NAME.fullmatch(row["name"]):
            service.operator.send(table.DELETE_TENANT, tenant=row["id"])


def _written(model: Path, scratch: Path, count: int) -> Iterator[Path]:
    """Yield folders of adapters as PEFT saves them, with small random weights. Only their cost matters, not their effect."""
    if count and not model.is_dir():
        raise SettingsError(f"Adapters are made to fit the base model, whose folder {model} is not on this machine. Use --adapters 0.")
    shapes = base_model_shapes(model) if count else {}
    for number in range(count):
        chance = np.random.default_rng(number)
        tensors = {}
        for module, (out_features, in_features) in shapes.items():
            if module.rpartition(".")[2] in LEAVES:
                tensors[f"base_model.model.{module}.lora_A.weight"] = _normal(chance, (RANK, in_features))
                tensors[f"base_model.model.{module}.lora_B.weight"] = _normal(chance, (out_features, RANK))
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": LEAVES, "bias": "none"}
        folder = scratch / f"adapter-{number}"
        folder.mkdir()
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        save_tensors(tensors, folder / MODEL_FILE)
        yield folder


def save_tensors(tensors: "Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]", path: Path) -> None:
    """Write tensors in the format safetensors, whose library comes only with an engine."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.tobytes())


def _normal(chance: np.random.Generator, shape: tuple[int, int]) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    return (0.01 * chance.standard_normal(shape)).astype(np.float32)
