"""Handlers for adapters: for a tenant under `/v1/adapters`, for an operator under `/admin/v1/tenants/{tenant}/adapters`."""

import errno
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec
from msgspec import UNSET
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from lmaas.adapters.config import CONFIG_FILE, MAX_CONFIG_BYTES
from lmaas.adapters.safetensors import MODEL_FILE
from lmaas.adapters.service import inspect
from lmaas.adapters.validation import check_file_names
from lmaas.api.base_models import defined_model
from lmaas.api.context import Api, ApiCall, WithStatus
from lmaas.api.decoding import decode
from lmaas.api.forms import multipart_form
from lmaas.api.operation import page_of
from lmaas.api.shapes.adapters import (
    Activation,
    Adapter,
    AdapterCheck,
    AdapterQuery,
    AdapterUpload,
    AdapterVersion,
    CheckedAdapter,
    DeletedAdapter,
    UploadedAdapter,
)
from lmaas.api.shapes.common import Page, Paging
from lmaas.api.shapes.models import NewBaseModel
from lmaas.api.staging import staged
from lmaas.engine.source import local_model_folder
from lmaas.errors import InvalidAdapter, InvalidRequest, TooLarge, Unavailable
from lmaas.http import parse_json
from lmaas.store import adapters as rows
from lmaas.store.models import get_base_model
from lmaas.store.paging import Part

FORM_OVERHEAD_BYTES = MAX_CONFIG_BYTES + 256 * 1024
MAX_VERSION = 10**9
_FILES = ("adapter_config", "adapter_model")
Form = TypeVar("Form", AdapterUpload, AdapterCheck)


def _version_values(version: rows.AdapterVersion) -> dict[str, Any]:
    return {name: getattr(version, name) for name in rows.AdapterVersion.__slots__}


def _adapter_values(adapter: rows.Adapter) -> dict[str, Any]:
    return {name: getattr(adapter, name) for name in rows.Adapter.__slots__}


async def list_adapters(api: Api, call: ApiCall[None, AdapterQuery]) -> Page[Adapter]:
    """Return a page of the tenant's adapters, by name."""
    query = call.query
    found = await rows.list_adapters(api.db, call.tenant_id, Part(query.limit, query.after), search=query.search or "")
    return page_of([Adapter(**_adapter_values(adapter)) for adapter in found], [adapter.id for adapter in found], query.limit)


async def get_adapter(api: Api, call: ApiCall[None, None]) -> Adapter:
    """Return one adapter."""
    return Adapter(**_adapter_values(await rows.get_adapter(api.db, call.tenant_id, call.path["name"])))


async def list_versions(api: Api, call: ApiCall[None, Paging]) -> Page[AdapterVersion]:
    """Return a page of the versions of an adapter, oldest first. The id of a version is the adapter's name, `@` and its number."""
    name, after = call.path["name"], None
    if call.query.after is not None:
        number = call.query.after.removeprefix(f"{name}@")
        if not number.isascii() or not number.isdigit() or len(number) > len(str(MAX_VERSION)):
            raise InvalidRequest("'after' is not the id of a version of this adapter.", code="invalid_cursor", param="after")
        after = int(number)
    found = await rows.list_versions(api.db, call.tenant_id, name, after=after, limit=call.query.limit + 1)
    ids = [f"{name}@{version.version}" for version in found]
    shown = [AdapterVersion(id=version_id, **_version_values(version)) for version_id, version in zip(ids, found, strict=True)]
    return page_of(shown, ids, call.query.limit)


async def activate_version(api: Api, call: ApiCall[Activation, None]) -> Adapter:
    """Make a version the live one."""
    name, version = call.path["name"], call.body.version
    adapter = await rows.activate(api.db, call.tenant_id, name, version if 0 < version < MAX_VERSION else 0, audit=call.audit)
    return Adapter(**_adapter_values(adapter))


async def delete_adapter(api: Api, call: ApiCall[None, None]) -> DeletedAdapter:
    """Delete an adapter with all its versions and files."""
    await api.adapters.delete(call.tenant_id, call.path["name"], audit=call.audit)
    return DeletedAdapter(name=call.path["name"], deleted=True)


async def upload_adapter(api: Api, call: ApiCall[None, None]) -> UploadedAdapter | WithStatus:
    """Store an adapter: 201 with its new version, or 200 with the version that has the same content already."""
    async with _received(api, call, AdapterUpload) as (form, config, model):
        uploaded = await api.adapters.upload(
            call.tenant_id,
            form.name,
            form.base_model,
            config,
            model,
            activate=form.activate == "true",
            base_folder=local_model_folder,
            audit=call.audit,
        )
    shown = UploadedAdapter(**(_adapter_values(uploaded.adapter) | _version_values(uploaded.version)))
    return shown if uploaded.is_new else WithStatus(shown, 200)


async def check_adapter(api: Api, call: ApiCall[None, None]) -> CheckedAdapter:
    """Check an adapter's files as an upload does, and store nothing."""
    async with _received(api, call, AdapterCheck) as (form, config, model):
        if (form.base_model is UNSET) == (form.definition is UNSET):
            raise InvalidRequest("Give either 'base_model' or 'definition'.", code="missing_parameter", param="base_model")
        if isinstance(form.definition, str):
            base = await defined_model(api.settings, decode(NewBaseModel, parse_json(form.definition.encode())))
        else:
            base = await get_base_model(api.db, str(form.base_model))
        content = await inspect(base, config, model, local_model_folder)
    return CheckedAdapter(
        content_hash=content.content_hash,
        rank=content.facts.rank,
        target_modules=list(content.facts.target_modules),
        size_bytes=content.size_bytes,
    )


@asynccontextmanager
async def _received(api: Api, call: ApiCall[None, None], kind: type[Form]) -> AsyncIterator[tuple[Form, bytes, Path]]:
    """Provide the fields, the configuration and the path of the weights of a form; the files are removed after the block.

    Raises InvalidRequest, InvalidAdapter, TooLarge or Unavailable.
    """
    # The files stream to disk, and are validated without executing anything.
    limit = api.settings.max_adapter_bytes + FORM_OVERHEAD_BYTES
    try:
        async with multipart_form(call.request, limit, max_files=16, max_fields=16) as form:
            with staged(api.settings.uploads) as folder:
                model = folder / MODEL_FILE
                fields = _fields(form, kind)
                config = await _config(form)
                sha256 = fields.sha256 if isinstance(fields.sha256, str) else None
                await run_in_threadpool(_copy, _file(form, "adapter_model").file, model, sha256)
                yield fields, config, model
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Unavailable(
                "The gateway's disk is full, so uploads are not possible. Retry later.", code="disk_full", retry_after_s=60
            ) from error
        raise


def _fields(form: FormData, kind: type[Form]) -> Form:
    """Return the text fields as `kind`, whose two files are left empty. Raises InvalidRequest, or InvalidAdapter for files other than the
    two of an adapter."""
    fields = {field.name: field.required for field in msgspec.structs.fields(kind) if field.name not in _FILES}
    texts: dict[str, Any] = {}
    files: list[str] = []
    for field, value in form.multi_items():
        if isinstance(value, UploadFile):
            name = (value.filename or field).replace("\\", "/").rsplit("/", 1)[-1]
            files.append(name)
            if field in _FILES and not _unsafe(name):
                # The file's name on the uploader's disk does not matter.
                files[-1] = CONFIG_FILE if field == "adapter_config" else MODEL_FILE
        elif field not in fields or field in texts:
            raise InvalidRequest(
                f"The form field '{field[:100]}' is not known, or given twice.", code="unexpected_field", param=field[:100]
            )
        elif "\0" in value:
            raise InvalidRequest(f"The form field '{field}' holds the character NUL.", code="invalid_type", param=field)
        elif value or not fields[field]:
            texts[field] = value
    check_file_names(files)
    return decode(kind, texts | dict.fromkeys(_FILES, ""), text=True)


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
