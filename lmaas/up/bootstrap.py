"""Prepares a stack for its first request: the base model, the operator's key and the credentials file."""

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
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lmaas.adapters.safetensors import base_model_shapes
from lmaas.audit import Action, Audit
from lmaas.config import Settings
from lmaas.engine import default_model
from lmaas.engine.source import engine_dtype, model_config, model_folder
from lmaas.errors import SettingsError
from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.process import bound_command
from lmaas.store.database import Database
from lmaas.store.models import BaseModel, put_base_model
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
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            bound_command(command), stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        ) as process,
        Progress(*columns, console=console) as progress,
    ):
        task = progress.add_task(f"Preparing the base model {default_model.NAME} (once)", total=100)
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
    dtype = engine_dtype(settings.engine_dtype, model_config(folder))
    model = BaseModel(
        id="",
        name=name,
        source=str(folder),
        dtype=dtype,
        linears={path: list(shape) for path, shape in base_model_shapes(folder).items()},
        max_lora_rank=settings.engine_max_lora_rank,
        max_loras=settings.engine_max_loras,
        max_cpu_loras=settings.engine_max_cpu_loras,
        max_num_seqs=settings.engine_max_num_seqs,
        max_model_len=settings.engine_max_model_len,
        kv_cache_bytes=settings.engine_kv_cache_bytes,
        engine_args=settings.engine_args,
    )
    return await put_base_model(db, model, audit=Audit(Action.BASE_MODEL_REGISTER))


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
