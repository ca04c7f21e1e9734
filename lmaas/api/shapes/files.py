"""Files, in OpenAI's shapes."""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType, field

from lmaas.api.shapes.common import Paging, Shape

MAX_FILES_PAGE = 10_000
MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 30 * 86400
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"

AnyPurpose = Literal["batch", "fine-tune", "evals", "user_data", "batch_output", "fine-tune-results"]
UploadPurpose = Literal["batch", "fine-tune", "evals", "user_data"]
NewPurpose = Annotated[
    UploadPurpose,
    Meta(
        description="What the file is for: input of batches, training data, data of evaluations, or anything else.",
        extra={"code": "invalid_purpose"},
    ),
]


class File(Shape, tag_field="object", tag="file", frozen=True, kw_only=True):
    """A file. Times are in Unix seconds; `expires_at` is null for a file that is kept until it is deleted."""

    id: str
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: AnyPurpose
    status: Annotated[Literal["processed"], Meta(description="As OpenAI's clients expect it.", extra_json_schema={"deprecated": True})]
    status_details: Annotated[None, Meta(extra_json_schema={"deprecated": True})]


class FileUpload(Shape, frozen=True, kw_only=True):
    """A form with a file. `expires_after` has both of its fields or none: then a file of the purpose `batch` expires after 30 days, and
    others are kept until they are deleted."""

    purpose: NewPurpose
    expires_after_anchor: Annotated[Literal["created_at"], Meta(description="The time from which the seconds count.")] | UnsetType = field(
        name=ANCHOR, default=UNSET
    )
    expires_after_s: (
        Annotated[int, Meta(ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S, description="The seconds after which the file expires.")] | UnsetType
    ) = field(name=SECONDS, default=UNSET)
    file: Annotated[bytes, Meta(extra_json_schema={"contentMediaType": "application/octet-stream"})]


class FileQuery(Paging, frozen=True, kw_only=True):
    """The files that are listed."""

    purpose: Annotated[AnyPurpose, Meta(description="Files of this purpose alone.")] | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_FILES_PAGE, description="Files of this page, at most.")] = MAX_FILES_PAGE
    order: Annotated[Literal["asc", "desc"], Meta(description="`asc`: oldest first. `desc`: newest first.")] = "desc"


class DeletedFile(Shape, tag_field="object", tag="file", frozen=True, kw_only=True):
    """A deleted file."""

    id: str
    deleted: bool
