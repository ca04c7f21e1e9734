"""Adapters over HTTP: for a tenant under `/v1/adapters`, for an operator under `/admin/v1/tenants/{tenant}/adapters`."""

import errno
import hashlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response

from lmaas.adapters.config import CONFIG_FILE, MAX_CONFIG_BYTES
from lmaas.adapters.safetensors import MODEL_FILE
from lmaas.adapters.service import inspect
from lmaas.adapters.validation import check_file_names
from lmaas.api.base_models import defined_model
from lmaas.api.context import Api, audited, json_body
from lmaas.api.forms import multipart_form
from lmaas.audit import Action
from lmaas.engine.source import local_model_folder
from lmaas.errors import InvalidAdapter, InvalidRequest, TooLarge, Unavailable
from lmaas.http import JsonResponse, parse_json
from lmaas.store import adapters as rows
from lmaas.store.models import get_base_model

#: `if_changed` has no effect any more: content that is there already never becomes a new version.
FIELDS = ("name", "base_model", "activate", "if_changed", "sha256")
#: `definition` is the JSON of a base model that does not exist yet, in place of the name of one.
CHECK_FIELDS = ("base_model", "definition", "sha256")
FORM_OVERHEAD_BYTES = MAX_CONFIG_BYTES + 256 * 1024
MAX_VERSION = 10**9


def shown_version(version: rows.AdapterVersion) -> dict[str, Any]:
    """A version as the API shows it."""
    return {
        "version": version.version,
        "content_hash": version.content_hash,
        "rank": version.rank,
        "target_modules": version.target_modules,
        "size_bytes": version.size_bytes,
        "created_at": version.created_at.isoformat(),
    }


def shown_adapter(adapter: rows.Adapter) -> dict[str, Any]:
    """An adapter as the API shows it."""
    return {
        "object": "adapter",
        "id": adapter.id,
        "name": adapter.name,
        "base_model": adapter.base_model,
        "live_version": adapter.live_version,
        "latest_version": adapter.latest_version,
        "created_at": adapter.created_at.isoformat(),
    }


async def list_adapters(api: Api, request: Request) -> Response:
    """Every adapter of the tenant."""
    tenant_id, _ = await api.tenant(request, manage=False)
    found = await rows.list_adapters(api.db, tenant_id)
    return JsonResponse({"object": "list", "data": [shown_adapter(adapter) for adapter in found]})


async def get_adapter(api: Api, request: Request) -> Response:
    """One adapter."""
    tenant_id, _ = await api.tenant(request, manage=False)
    return JsonResponse(shown_adapter(await rows.get_adapter(api.db, tenant_id, request.path_params["name"])))


async def list_versions(api: Api, request: Request) -> Response:
    """The versions of an adapter, oldest first."""
    tenant_id, _ = await api.tenant(request, manage=False)
    found = await rows.list_versions(api.db, tenant_id, request.path_params["name"])
    return JsonResponse({"object": "list", "data": [shown_version(version) for version in found]})


async def activate_version(api: Api, request: Request) -> Response:
    """Make a version the live one."""
    tenant_id, principal = await api.tenant(request, manage=True)
    name = request.path_params["name"]
    version = (await json_body(request, {"version": int}, ("version",)))["version"]
    audit = audited(request, principal, Action.ADAPTER_ACTIVATE)
    await rows.activate(api.db, tenant_id, name, version if 0 < version < MAX_VERSION else 0, audit=audit)
    return JsonResponse(shown_adapter(await rows.get_adapter(api.db, tenant_id, name)))


async def delete_adapter(api: Api, request: Request) -> Response:
    """Delete an adapter with all its versions and files."""
    tenant_id, principal = await api.tenant(request, manage=True)
    name = request.path_params["name"]
    await api.adapters.delete(tenant_id, name, audit=audited(request, principal, Action.ADAPTER_DELETE))
    return JsonResponse({"object": "adapter.deleted", "name": name, "deleted": True})


async def upload_adapter(api: Api, request: Request) -> Response:
    """Upload an adapter: 201 with its new version, or 200 with the earlier version that has the same content."""
    tenant_id, principal = await api.tenant(request, manage=True)
    async with _received(api, request, FIELDS, ("name", "base_model")) as (fields, config, model):
        version, is_new = await api.adapters.upload(
            tenant_id,
            fields["name"],
            fields["base_model"],
            config,
            model,
            activate=fields.get("activate", "true") == "true",
            base_folder=local_model_folder,
            audit=audited(request, principal, Action.ADAPTER_UPLOAD),
        )
    name = fields["name"]
    adapter = await rows.get_adapter(api.db, tenant_id, name)
    versions = await rows.list_versions(api.db, tenant_id, name)
    mine = next(shown_version(row) for row in versions if row.version == version)
    return JsonResponse(shown_adapter(adapter) | mine, status_code=201 if is_new else 200)


async def check_adapter(api: Api, request: Request) -> Response:
    """Check an adapter's files as an upload does, and store nothing. Operators see what `lmaas apply` would do by it."""
    await api.operator(request)
    async with _received(api, request, CHECK_FIELDS, ()) as (fields, config, model):
        if ("base_model" in fields) == ("definition" in fields):
            raise InvalidRequest("Give either 'base_model' or 'definition'.", code="missing_parameter", param="base_model")
        if "definition" in fields:
            base = await defined_model(api.settings, parse_json(fields["definition"].encode()))
        else:
            base = await get_base_model(api.db, fields["base_model"])
        content = await inspect(base, config, model, local_model_folder)
    return JsonResponse(
        {
            "object": "adapter_check",
            "content_hash": content.content_hash,
            "rank": content.facts.rank,
            "target_modules": list(content.facts.target_modules),
            "size_bytes": content.size_bytes,
        }
    )


@asynccontextmanager
async def _received(
    api: Api, request: Request, known: Collection[str], required: Collection[str]
) -> AsyncIterator[tuple[dict[str, str], bytes, Path]]:
    """Provide the text fields, the configuration and the path of the weights of a form; the files are removed after the block.

    Raises InvalidRequest, InvalidAdapter, TooLarge or Unavailable.
    """
    # The files stream to disk, and are validated without executing anything.
    limit = api.settings.max_adapter_bytes + FORM_OVERHEAD_BYTES
    try:
        async with multipart_form(request, limit, max_files=16, max_fields=16) as form, _staged(api) as model:
            fields = _fields(form, known, required)
            config = await _config(form)
            await run_in_threadpool(_copy, _file(form, "adapter_model").file, model, fields.get("sha256"))
            yield fields, config, model
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Unavailable("There is no disk space left for uploads.", code="disk_full", retry_after_s=60) from error
        raise


def _fields(form: FormData, known: Collection[str], required: Collection[str]) -> dict[str, str]:
    """Return the text fields. Raises InvalidRequest, or InvalidAdapter for files other than the two of an adapter."""
    texts: dict[str, str] = {}
    files: list[str] = []
    for field, value in form.multi_items():
        if isinstance(value, UploadFile):
            name = (value.filename or field).replace("\\", "/").rsplit("/", 1)[-1]
            files.append(name)
            if field in ("adapter_config", "adapter_model") and not _unsafe(name):
                # What the file is called on the uploader's disk does not matter.
                files[-1] = CONFIG_FILE if field == "adapter_config" else MODEL_FILE
        elif field not in known or field in texts:
            raise InvalidRequest(
                f"The form field '{field[:100]}' is not known, or given twice.", code="unexpected_field", param=field[:100]
            )
        elif "\0" in value:
            raise InvalidRequest(f"The form field '{field}' holds the character NUL.", code="invalid_type", param=field)
        else:
            texts[field] = value
    check_file_names(files)
    for field in required:
        if not texts.get(field):
            raise InvalidRequest(f"The form field '{field}' is required.", code="missing_parameter", param=field)
    for field in ("activate", "if_changed"):
        if texts.get(field, "true") not in ("true", "false"):
            raise InvalidRequest(f"'{field}' must be 'true' or 'false'.", code="invalid_type", param=field)
    return texts


def _unsafe(name: str) -> bool:
    try:
        check_file_names([CONFIG_FILE, MODEL_FILE, name])
    except InvalidAdapter as error:
        return error.error_code == "unsafe_format"
    return False


def _file(form: FormData, field: str) -> UploadFile:
    value = form.get(field)
    if not isinstance(value, UploadFile):
        raise InvalidRequest(f"The form field '{field}' must be a file.", code="missing_parameter", param=field)
    return value


async def _config(form: FormData) -> bytes:
    config = await _file(form, "adapter_config").read(MAX_CONFIG_BYTES + 1)
    if len(config) > MAX_CONFIG_BYTES:
        raise TooLarge(f"adapter_config.json may have {MAX_CONFIG_BYTES} bytes at most.", param="adapter_config")
    return config


@asynccontextmanager
async def _staged(api: Api) -> AsyncIterator[Path]:
    """Provide a path for the file while it is validated. Everything in its folder is removed afterwards."""
    folder = api.settings.home / "uploads"
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder))
    try:
        yield staging / MODEL_FILE
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _copy(source: BinaryIO, target: Path, sha256: str | None) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as file:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            file.write(chunk)
    if sha256 is not None and sha256.lower() != digest.hexdigest():
        raise InvalidAdapter(
            "adapter_model does not have the given SHA-256: it was changed or cut on its way. Upload it again.",
            code="digest_mismatch",
            param="sha256",
        )
