"""The tenants and adapters of a run, created for it or found, and the popularity of each."""

import json
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lmaas.adapters.config import CONFIG_FILE
from lmaas.adapters.safetensors import MODEL_FILE, base_model_shapes
from lmaas.api import table
from lmaas.errors import SettingsError
from loadtest.service import Service

RANK = 8
LEAVES = ("q_proj", "v_proj")
#: The names of tenants that load tests create.
NAME = re.compile(r"load-\d{3,}")


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


def found(service: Service) -> list[Target]:
    """Return the models of the tenants in the credentials file. Raises SettingsError if there are none."""
    targets = []
    for tenant, key in service.keys.items():
        adapters = [row["name"] for row in service.operator.items(table.LIST_ADAPTERS, tenant=tenant)]
        targets += [Target(tenant, key, adapter, is_adapter=True) for adapter in adapters]
        targets.append(Target(tenant, key, service.model, is_adapter=False))
    if not targets:
        raise SettingsError("The credentials file has no tenants. Have some made: --tenants 8.")
    return targets


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
        save_file(tensors, folder / MODEL_FILE, {"format": "pt"})
        yield folder


def _normal(chance: np.random.Generator, shape: tuple[int, int]) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    return (0.01 * chance.standard_normal(shape)).astype(np.float32)
