"""Adapters: the list, the versions of each, and uploads."""

import asyncio
from typing import Any

from starlette.datastructures import UploadFile
from starlette.responses import Response

from lmaas.api.table import ACTIVATE_VERSION, DELETE_ADAPTER, GET_ADAPTER, LIST_ADAPTERS, LIST_VERSIONS, UPLOAD_ADAPTER
from lmaas.console.api import Unread
from lmaas.console.command import command
from lmaas.console.models import base_models
from lmaas.console.page import EVERYONE, Fields, Page, Section, Visit, errors_of, get, post
from lmaas.errors import ApiError
from lmaas.types import Role

LIST, UPLOAD = "/adapters", "/upload-adapter"
PAGE_SIZE = 50
VERSIONS = 100
#: An upload as large as the largest that a gateway may be set to take. The gateway refuses what is above its own limit.
MAX_UPLOAD_BYTES = 16 * 2**30
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: The form has one field for both files; the API has one for each.
_FILES = "files"
_API_FILES = {"adapter_config", "adapter_model", "sha256"}


async def show_list(visit: Visit) -> Response:
    """Show a page of the adapters."""
    search, after = visit.query.get("search", "").strip()[:63], visit.query.get("after")
    query = {"search": search, "after": after, "limit": PAGE_SIZE}
    found = await visit.api.read_all(adapters=visit.api.send(LIST_ADAPTERS, query=query))
    shown = command(visit, "adapter", "list", *(["--search", search] if search else []))
    return visit.render("adapters.html", search=search, after=after, command=shown, may_change=_may_change(visit), **found)


async def show(visit: Visit) -> Response:
    """Show an adapter and its versions."""
    name = visit.path["name"]
    versions = {"limit": VERSIONS, "after": visit.query.get("after")}
    adapter, found = await asyncio.gather(
        visit.api.send(GET_ADAPTER, name=name), visit.api.read_all(versions=visit.api.send(LIST_VERSIONS, query=versions, name=name))
    )
    return _shown(visit, adapter, found["versions"])


async def activate(visit: Visit) -> Response:
    """Make a version the live one."""
    name, text = visit.path["name"], visit.form["version"]
    version = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    await visit.api.send(ACTIVATE_VERSION, {"version": version}, name=name)
    return visit.redirect(f"{LIST}/{name}", f"Version {version} of {name} is live. Requests for {name} run on it from now on.")


async def delete(visit: Visit) -> Response:
    """Delete an adapter with all its versions."""
    name = visit.path["name"]
    await visit.api.send(DELETE_ADAPTER, name=name)
    return visit.redirect(LIST, f"The adapter {name} was deleted with all its versions.")


async def show_upload(visit: Visit) -> Response:
    """Show the form of an upload."""
    return await _form(
        visit, Fields({"name": visit.query.get("name", ""), "base_model": visit.query.get("base_model", ""), "activate": "true"})
    )


async def upload(visit: Visit) -> Response:
    """Upload the two files of an adapter."""
    typed = visit.typed("name", "base_model")
    body = {"name": "", "base_model": "", **typed, "activate": "true" if visit.form["activate"] else "false"}
    files = [file for file in visit.form_data.getlist(_FILES) if isinstance(file, UploadFile) and file.filename]
    if message := _missing(files):
        return await _form(visit, visit.form, Fields({_FILES: message}), 400)
    sent = {_field(file): (file.filename, file.file, "application/octet-stream") for file in files}
    try:
        stored = await visit.api.send(UPLOAD_ADAPTER, body, files=sent)
    except ApiError as error:
        if error.status in (401, 403):
            raise
        # A name of a file in the message's place is about the field for both files.
        about_file = (error.param or "").partition(".")[0] in _API_FILES
        errors = Fields({_FILES: error.message}) if about_file else errors_of(error, body)
        return await _form(visit, visit.form, errors, error.status)
    name, version = stored["name"], stored["version"]
    state = "It is live." if stored["live_version"] == version else "It is not live yet: activate it below."
    return visit.redirect(f"{LIST}/{name}", f"{name} has version {version}, with rank {stored['rank']}. {state}")


def _shown(visit: Visit, adapter: dict[str, Any], versions: Any) -> Response:
    name, live = adapter["name"], adapter["live_version"]
    commands = [
        command(visit, "adapter", "versions", name),
        command(visit, "adapter", "activate", name, str(live or adapter["latest_version"])),
    ]
    return visit.render(
        "adapter.html",
        adapter=adapter,
        versions=versions if isinstance(versions, Unread) else {**versions, "data": versions["data"][::-1]},
        may_change=_may_change(visit),
        may_try=not visit.person.is_operator,
        commands=commands,
        delete_command=command(visit, "adapter", "delete", name),
    )


async def _form(visit: Visit, typed: Fields, errors: Fields | None = None, status: int = 200) -> Response:
    found = await visit.api.read_all(bases=base_models(visit))
    name, base = typed["name"].strip() or "NAME", typed["base_model"] or "BASE_MODEL"
    return visit.render(
        "adapter_upload.html",
        status=status,
        typed=typed,
        errors=errors or Fields(),
        command=command(visit, "adapter", "upload", name, "FOLDER", "--base-model", base),
        may_change=_may_change(visit),
        **found,
    )


def _missing(files: list[UploadFile]) -> str:
    """Return what is wrong with the choice of files, or an empty text."""
    names = sorted(file.filename or "" for file in files)
    if sorted(_field(file) for file in files) == ["adapter_config", "adapter_model"]:
        return ""
    chosen = f" You chose {', '.join(names)}."[:500] if names else ""
    return f"Choose two files together: {CONFIG} and {WEIGHTS}.{chosen}"


def _field(file: UploadFile) -> str:
    name = (file.filename or "").lower()
    return "adapter_config" if name.endswith(".json") else "adapter_model" if name.endswith(".safetensors") else name


def _may_change(visit: Visit) -> bool:
    return visit.person.role is not Role.INFERENCE


PAGE = Page(
    LIST,
    "Adapters",
    Section.MODELS,
    EVERYONE,
    (
        get(LIST, show_list),
        get(LIST + "/{name}", show),
        post(LIST + "/{name}/activate", activate),
        post(LIST + "/{name}/delete", delete),
        get(UPLOAD, show_upload),
        post(UPLOAD, upload, max_bytes=MAX_UPLOAD_BYTES),
    ),
    of_tenant=True,
)
