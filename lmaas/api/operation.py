"""One operation of the management API: what the routes, the checks, the OpenAPI document and the clients need to know of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import quote

from msgspec import Struct

from lmaas.api.shapes.common import Page, Paging, Query
from lmaas.audit import Action
from lmaas.errors import InvalidRequest

_TENANTS = "/v1"
_OPERATORS = "/admin/v1/tenants/{tenant}"
_PARAMETER = re.compile(r"{(\w+)}")
#: Values that are not one segment of a path to every server, proxy and client on the way: an empty value, `.` and `..`, and any value with
#: a slash, a backslash, a percent sign (it would be decoded once more), a control character or half of a surrogate pair.
_NO_SEGMENT = re.compile(r"\.{0,2}|.*[/\\%\x00-\x1f\x7f\ud800-\udfff].*", re.DOTALL)
#: The thing that a parameter names, where that is another word.
_THINGS = {"name": "adapter", "model": "base model"}


class Permission(StrEnum):
    """The keys that may call an operation. An operator names the tenant in the path, where the operation is about a tenant's resources."""

    #: An operator's key.
    OPERATOR = "operator"
    #: A key of the tenant with the role `tenant_admin`, or an operator's.
    TENANT_ADMIN = "tenant_admin"
    #: Any key of the tenant, or an operator's.
    TENANT = "tenant"


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of the table (`lmaas.api.table`).

    An operation on a tenant's resources (permission TENANT or TENANT_ADMIN) has its `path` under `/v1`, for keys of tenants, and with
    `for_operators` a second one under `/admin/v1/tenants/{tenant}`, for keys of operators. `audit` is the action that the audit log
    records if the operation changes something. `files` are the fields of a form that are files: then the body is a multipart form.
    `texts` are the fields of the body whose strings are for a model: then the body may be as large as that of an inference request.
    With `reads_body` the handler reads the body itself, as a form's always does. `media` is the type of the answer; with another than JSON
    the handler returns a response, and `answer` describes what is in it, if it is JSON too.
    A report with `csv` is also served as CSV, if it is asked for.
    `also` describes further statuses of success. `events` describes the server-sent events that it may send instead.
    """

    id: str
    method: str
    path: str
    permission: Permission
    summary: str
    answer: type[Struct] | None
    body: type[Struct] | None = None
    query: type[Query] | None = None
    status: int = 200
    also: Mapping[int, str] = field(default_factory=dict)
    audit: Action | None = None
    files: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    reads_body: bool = False
    media: str = "application/json"
    for_operators: bool = True
    events: str = ""
    csv: bool = False

    @property
    def is_paged(self) -> bool:
        """True if the answer is a list in pages."""
        return self.query is not None and issubclass(self.query, Paging)

    @property
    def places(self) -> tuple["Place", ...]:
        """The places where the operation is served."""
        places = [Place(self, self.id, self.path, self.permission)]
        if self.operator_path is not None:
            places.append(Place(self, f"{self.id}_of_tenant", self.operator_path, Permission.OPERATOR))
        return tuple(places)

    @property
    def operator_path(self) -> str | None:
        """The path for operators of an operation on a tenant's resources."""
        if self.permission is Permission.OPERATOR or not self.for_operators:
            return None
        return _OPERATORS + self.path.removeprefix(_TENANTS)


@dataclass(frozen=True, slots=True)
class Place:
    """An operation at one path. `id` is unique among all places."""

    operation: Operation
    id: str
    path: str
    permission: Permission

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters of the path."""
        return _PARAMETER.findall(self.path)


def filled(path: str, values: Mapping[str, str]) -> str:
    """Return the path with its parameters replaced by these values.

    Raises KeyError if one is missing, and InvalidRequest for a value that would not stay one segment of the path, which no name or id has.
    """
    return _PARAMETER.sub(lambda found: _segment(found[1], values[found[1]]), path)


def _segment(parameter: str, value: str) -> str:
    if _NO_SEGMENT.fullmatch(value) is not None:
        raise InvalidRequest(
            f"There can be no {_THINGS.get(parameter, parameter)} with the name or id {value[:100]!a}.", code="invalid_name"
        )
    return quote(value, safe="")


def page_of(rows: list[Any], ids: list[str], limit: int) -> Page[Any]:
    """Return a page of at most `limit` of these rows. One row more than `limit` shows that there is another page."""
    shown = ids[:limit]
    first, last = (shown[0], shown[-1]) if shown else (None, None)
    return Page(data=rows[:limit], first_id=first, last_id=last, has_more=len(rows) > limit)
