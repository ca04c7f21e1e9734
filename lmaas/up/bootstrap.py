"""Prepares a stack for its first request: the base models, the operator's key and the credentials file."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lmaas.api.base_models import defined_model
from lmaas.api.shapes.models import NewBaseModel
from lmaas.audit import Action, Audit
from lmaas.config import Settings
from lmaas.engine import default_model, embedding_model
from lmaas.engine.source import is_folder, model_folder
from lmaas.errors import Conflict, InvalidRequest, SettingsError
from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.process import bound_command
from lmaas.states import PoolKind
from lmaas.store.database import Database
from lmaas.store.models import BaseModel, create_base_model, list_base_models, put_base_model
from lmaas.store.tenants import create_key, find_principal
from lmaas.types import Role, is_model_name
from lmaas.up.keeping import ending


def prepare_default_model(settings: Settings, console: Console, stopped: Callable[[], bool] = lambda: False) -> Path:
    """Convert the default model if it is not in the cache yet. Raises SettingsError if that fails, or if `stopped` is set meanwhile."""
    try:
        folder = settings.cache.expanduser() / "models" / default_model.NAME
        if folder.exists():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(f"The cache folder {settings.cache} cannot be used: {why}. Set LMAAS_CACHE to a folder of your own.") from error
    command = [sys.executable, "-W", "ignore", "-m", default_model.__name__, str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            bound_command(command), stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        ) as process,
        Progress(*columns, console=console) as progress,
    ):
        task = progress.add_task("Preparing the base model (once)", total=100)
        for line in process.stdout or ():
            with contextlib.suppress(ValueError):
                progress.update(task, completed=float(line))
            if stopped():
                process.kill()
                raise SettingsError("Stopped before the base model was prepared.")
        if process.wait() == 0 and folder.exists():
            progress.update(task, completed=100)
            return folder
        errors.seek(0)
        lines = [line.strip() for line in errors if line.strip()]
        why = lines[-1][-500:] if lines else ending(process.returncode)
        raise SettingsError(f"The default base model could not be prepared in {folder.parent}: {why}")


def _given_folder(source: str) -> Path:
    """Return the folder of LMAAS_MODEL. A path is relative to where lmaas was started."""
    here = Path(source).expanduser()
    return model_folder(str(here.resolve()) if here.is_dir() else source)


async def register_model(settings: Settings, db: Database, console: Console, stopped: Callable[[], bool] = lambda: False) -> BaseModel:
    """Register the base model of the settings. Values that an operator has changed are kept."""
    if settings.model:
        folder = _given_folder(settings.model)
    else:
        folder = await asyncio.to_thread(prepare_default_model, settings, console, stopped)
    name = default_model.registered_name(settings)
    if not is_model_name(name):
        raise SettingsError(f"{name!r} cannot be a model's name. Set LMAAS_MODEL_NAME to lower-case letters, digits, '.', '_' or '-'.")
    model = await defined_model(settings, NewBaseModel(name=name, source=str(folder)))
    return await put_base_model(db, model, audit=Audit(Action.BASE_MODEL_REGISTER))


async def register_embedding_model(settings: Settings, db: Database, console: Console) -> BaseModel | None:
    """Register the embedding model of the settings, and return it; None if none is offered.

    Raises SettingsError or InvalidRequest for one of the settings that cannot be used. Without such a setting, it is the one from the
    wheel.
    """
    asked = settings.embedding_model
    if asked == embedding_model.NONE:
        return None
    if not asked:
        return await _register_packaged(settings, db, console)
    name, folder = Path(asked).name.lower(), _given_folder(asked)
    if not is_model_name(name):
        raise SettingsError(f"{name!r}, from LMAAS_EMBEDDING_MODEL, cannot be a model's name. Rename the folder, or use `lmaas model add`.")
    model = await defined_model(settings, NewBaseModel(name=name, source=str(folder)))
    if model.kind is not PoolKind.EMBED:
        raise SettingsError(f"LMAAS_EMBEDDING_MODEL is {asked!r}, which is no embedding model. Give another one, or 'none'.")
    return await put_base_model(db, model, audit=Audit(Action.BASE_MODEL_REGISTER))


async def _register_packaged(settings: Settings, db: Database, console: Console) -> BaseModel | None:
    """Register the embedding model from the wheel. It is optional: if the wheel is not installed, if the model cannot be copied or used, or
    if its name is in use for another model or for an adapter, the service runs without it."""
    packaged, name = embedding_model.packaged_folder(), embedding_model.NAME
    if packaged is None or name == default_model.registered_name(settings):
        return None
    try:
        folder = await asyncio.to_thread(embedding_model.prepare, packaged, settings.cache)
        model = await defined_model(settings, NewBaseModel(name=name, source=str(folder)))
        known = next((each for each in await list_base_models(db) if each.name == name), None)
        if known is None:
            return await create_base_model(db, model, audit=Audit(Action.BASE_MODEL_REGISTER))
        # Another source is an operator's own model, unless it is the cache of before, which is gone.
        moved = known.kind is model.kind and is_folder(known.source) and not await asyncio.to_thread(Path(known.source).exists)
        ours = known.source == model.source or (moved and Path(known.source).name == name)
        return await put_base_model(db, model, audit=Audit(Action.BASE_MODEL_REGISTER)) if ours else None
    except (Conflict, InvalidRequest) as error:
        why = error.message
    except OSError as error:
        why = f"The cache folder {settings.cache} cannot be used: {error.strerror or error}."
    console.print(f"The embedding model {name} is not offered. {why}", markup=False, highlight=False)
    return None


def read_credentials(settings: Settings) -> dict[str, Any]:
    """Return the contents of the credentials file, or an empty one. Raises SettingsError if it cannot be read."""
    try:
        found: dict[str, Any] = json.loads(settings.credentials_path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SettingsError(f"{settings.credentials_path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise SettingsError(f"{settings.credentials_path} is not a file of credentials. Remove it, and `lmaas up` writes a new one.")
    return found


def write_credentials(settings: Settings, credentials: dict[str, Any]) -> None:
    """Replace the credentials file as a whole, readable by its owner only."""
    path = settings.credentials_path
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(credentials, file, indent=2)
        file.write("\n")
    partial.replace(path)


async def ensure_console_key(settings: Settings, db: Database) -> str | None:
    """Return the key with which this stack's console makes sessions of people, as a file of the home has it. Without OIDC there is none.

    Raises SettingsError if the file cannot be read or written.
    """
    if settings.console_oidc_issuer is None or settings.console_key is not None:
        return settings.console_key
    path = settings.home / "console-key"
    try:
        key = path.read_text().strip() if path.exists() else ""
        principal = await find_principal(db, hash_key(key))
        if principal is None or principal.role is not Role.OPERATOR:
            key = new_key()
            await create_key(db, None, Role.OPERATOR, "console", hash_key(key), shown_prefix(key), audit=Audit(Action.KEY_CREATE))
            path.write_text(key)
    except OSError as error:
        raise SettingsError(f"{path} cannot be used: {error.strerror or error}.") from error
    return key


async def ensure_operator_key(settings: Settings, db: Database) -> str:
    """Return the operator's key of this stack: the one in the credentials file if it works, otherwise a new one."""
    credentials = read_credentials(settings)
    key = credentials.get("operator_key")
    if not isinstance(key, str) or (await find_principal(db, hash_key(key))) is None:
        key = new_key()
        name = f"lmaas up, {time.strftime('%Y-%m-%d')}"
        await create_key(db, None, Role.OPERATOR, name, hash_key(key), shown_prefix(key), audit=Audit(Action.KEY_CREATE))
    tenants = credentials.get("tenants")
    tenants = tenants if isinstance(tenants, dict) else {}
    write_credentials(settings, {"base_url": settings.base_url, "operator_key": key, "tenants": tenants})
    return key
