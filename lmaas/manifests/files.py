"""Reading manifests: YAML whose every field is known and of its type."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lmaas.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Change:
    """What was done to one thing: `created`, `changed` or `unchanged`."""

    thing: str
    name: str
    outcome: str


def load(path: Path) -> Any:
    """The file's content. Raises InvalidRequest, naming the file."""
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidRequest(f"{path}: {error}") from error


def check(path: Path, value: Any, fields: Mapping[str, type], required: tuple[str, ...] = (), where: str = "") -> None:
    """Raises InvalidRequest unless `value` is a mapping of `fields`, each of its type (a whole number is a float too)."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path}: {where.rstrip('.') or 'the file'} must be a mapping.")
    for name, item in value.items():
        if name not in fields:
            raise InvalidRequest(f"{path}: '{where}{name}' is not known. Known are: {', '.join(fields)}.")
        if not isinstance(item, (int, float) if fields[name] is float else fields[name]) or isinstance(item, bool):
            raise InvalidRequest(f"{path}: '{where}{name}' must be of the type {fields[name].__name__}.")
    for name in required:
        if name not in value:
            raise InvalidRequest(f"{path}: '{where}{name}' is missing.")


def yaml_files(folder: Path) -> list[Path]:
    """The YAML files of a folder, by name; none if there is no folder."""
    return sorted((*folder.glob("*.yaml"), *folder.glob("*.yml")))
