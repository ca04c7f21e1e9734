"""Adapters and their versions."""

from datetime import datetime
from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from lmaas.api.shapes.common import Name, Paging, Shape

Flag = Literal["true", "false"]
Sha256 = Annotated[str, Meta(description="SHA-256 of adapter_model in hex; checked if given.")]
ConfigFile = Annotated[bytes, Meta(extra_json_schema={"contentMediaType": "application/json"})]
ModelFile = Annotated[bytes, Meta(extra_json_schema={"contentMediaType": "application/octet-stream"})]


class AdapterQuery(Paging, frozen=True, kw_only=True):
    """The adapters that are listed."""

    search: Annotated[str, Meta(max_length=63, description="Adapters whose names contain this text.")] | None = None


class AdapterVersion(Shape, tag_field="object", tag="adapter.version", frozen=True, kw_only=True):
    """One immutable upload. `id` is the name that pins it in a request."""

    id: str
    version: int
    content_hash: str
    rank: int
    target_modules: list[str]
    size_bytes: int
    created_at: datetime


class Adapter(Shape, tag_field="object", tag="adapter", frozen=True, kw_only=True):
    """An adapter. Requests for its name run on the live version; null until one is activated."""

    id: str
    name: Name
    base_model: str
    live_version: int | None
    latest_version: int
    created_at: datetime
    activated_by: Annotated[str | None, Meta(description="The role of the key that made the live version live; null if not known.")]


class UploadedAdapter(Adapter, tag_field="object", tag="adapter", frozen=True, kw_only=True):
    """An adapter with the version that has the uploaded content. `created_at` is the version's."""

    version: int
    content_hash: str
    rank: int
    target_modules: list[str]
    size_bytes: int


class AdapterUpload(Shape, frozen=True, kw_only=True):
    """A form with the two files of an adapter, as PEFT saves them."""

    name: Name
    base_model: str
    activate: Annotated[Flag, Meta(description="Whether the version goes live.")] = "true"
    if_changed: Annotated[
        Flag,
        Meta(description="No effect: content that a version has already never becomes a new one.", extra_json_schema={"deprecated": True}),
    ] = "true"
    sha256: Sha256 | UnsetType = UNSET
    adapter_config: ConfigFile
    adapter_model: ModelFile


class AdapterCheck(Shape, frozen=True, kw_only=True):
    """A form with the two files of an adapter to check. It has either `base_model` or `definition`."""

    base_model: str | UnsetType = UNSET
    definition: (
        Annotated[str, Meta(description="The JSON of a base model that does not exist yet, in place of the name of one.")] | UnsetType
    ) = UNSET
    sha256: Sha256 | UnsetType = UNSET
    adapter_config: ConfigFile
    adapter_model: ModelFile


class CheckedAdapter(Shape, tag_field="object", tag="adapter_check", frozen=True, kw_only=True):
    """The version that an upload would store."""

    content_hash: str
    rank: int
    target_modules: list[str]
    size_bytes: int


class Activation(Shape, frozen=True, kw_only=True):
    """The version that becomes live; an older one is a rollback."""

    version: int


class DeletedAdapter(Shape, tag_field="object", tag="adapter.deleted", frozen=True, kw_only=True):
    """An adapter that has been deleted with its versions and files."""

    name: str
    deleted: bool
