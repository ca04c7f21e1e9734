"""Reading every manifest of a folder, before anything is changed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lmaas.errors import InvalidRequest
from lmaas.manifests.files import refusing, yaml_files
from lmaas.manifests.models import FOLDER, ModelManifest, read_model
from lmaas.manifests.tenants import TenantManifest, read_tenant

Manifest = TypeVar("Manifest")


@dataclass(frozen=True, slots=True)
class Manifests:
    """The base models and tenants that are to exist, by file name."""

    models: tuple[ModelManifest, ...] = ()
    tenants: tuple[TenantManifest, ...] = ()


def read_folder(folder: Path) -> Manifests:
    """Read the tenants' manifests of a folder and the base models' of its `models/`; or one file.

    Raises InvalidRequest with a line for each file that is wrong, and for each name that two manifests have.
    """
    problems: list[str] = []
    with refusing(folder):
        model_files, tenant_files = _files(folder)
    models = _read_all(model_files, read_model, problems)
    tenants = _read_all(tenant_files, read_tenant, problems)
    problems += _twice("base model", models) + _twice("tenant", tenants)
    if problems:
        raise InvalidRequest("\n".join(problems))
    return Manifests(tuple(models), tuple(tenants))


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the manifests of base models and those of tenants in a folder, or the one file."""
    if folder.is_dir():
        if folder.resolve().name == FOLDER:
            return yaml_files(folder), []
        return yaml_files(folder / FOLDER), yaml_files(folder)
    if not folder.exists():
        raise InvalidRequest(f"The folder or file {folder} does not exist.")
    if not folder.is_file():
        raise InvalidRequest(f"{folder} is neither a folder nor a regular file.")
    return ([folder], []) if folder.resolve().parent.name == FOLDER else ([], [folder])


def _read_all(paths: Sequence[Path], read: Callable[[Path], Manifest], problems: list[str]) -> list[Manifest]:
    found = []
    for path in paths:
        try:
            found.append(read(path))
        except InvalidRequest as error:
            problems.append(error.message)
    return found


def _twice(what: str, manifests: Sequence[ModelManifest] | Sequence[TenantManifest]) -> list[str]:
    first: dict[str, Path] = {}
    problems = []
    for manifest in manifests:
        if manifest.name in first:
            files = f"{first[manifest.name]} and {manifest.path}"
            problems.append(f"{files} are both for the {what} '{manifest.name}'. Join them in one file, or rename one.")
        first.setdefault(manifest.name, manifest.path)
    return problems
