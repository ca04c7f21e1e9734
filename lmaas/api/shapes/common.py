"""The common parts of the shapes: their base, lists in pages, names and limits."""

from datetime import date
from typing import Annotated, Generic, TypeVar

from msgspec import Meta, Struct

from lmaas.types import MODEL_ID_PREFIX, NAME_PATTERN, TENANT_ID_PREFIX

MAX_PAGE = 1000
MAX_LIMIT = 10**15
#: The rule for the names of tenants, base models and adapters, in words. A name breaks it with the code `invalid_name`.
NAME_WORDS = "1 to 63 lower-case letters, digits, '.', '_' or '-', beginning and ending with a letter or digit"

Item = TypeVar("Item")


class Shape(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A body or an answer. It has no other fields than those of its type."""


class Query(Struct, frozen=True, kw_only=True):
    """The query string of an operation. Other parameters have no effect."""


class DryRun(Query, frozen=True, kw_only=True):
    """The query of a change that can be tried out."""

    dry_run: Annotated[bool, Meta(description="Check and answer as without it, with status 200, and store nothing.")] = False


class Paging(Query, frozen=True, kw_only=True):
    """The requested part of a list."""

    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE, description="Items of this page, at most.")] = 100
    after: Annotated[str, Meta(max_length=200, description="The id of an item: the page begins after it.")] | None = None


class Page(Shape, Generic[Item], tag_field="object", tag="list", frozen=True, kw_only=True):
    """A part of a list. If `has_more`, the next page is the one with `after` set to this `last_id`."""

    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


#: The end of a pattern: in Python, `$` alone also matches before a line's end.
END = "$(?!\\n)"


def _name(id_prefix: str = "") -> Meta:
    words = f"{NAME_WORDS}, and not beginning with '{id_prefix}', as ids do" if id_prefix else NAME_WORDS
    start = f"(?!{id_prefix})" if id_prefix else ""
    return Meta(pattern=f"^{start}{NAME_PATTERN.pattern}{END}", description=words, extra={"code": "invalid_name", "words": words})


Name = Annotated[str, _name()]
#: Names of base models and tenants, which can be found by their ids too.
ModelName = Annotated[str, _name(MODEL_ID_PREFIX)]
TenantName = Annotated[str, _name(TENANT_ID_PREFIX)]
#: A limit of a body. 0 and null both mean that there is no limit of its own; answers then have null.
NewLimit = Annotated[int, Meta(ge=0, le=MAX_LIMIT, description="0 or null: no limit of its own.")]
Day = Annotated[date, Meta(description="A day (UTC) such as 2026-11-22.")]
