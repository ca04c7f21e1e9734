"""A page of the console: its place in the navigation, its routes, and the visit that its handlers get."""

import base64
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlencode

import msgspec
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from lmaas.console.api import ApiClient
from lmaas.console.rendering import Templates
from lmaas.console.session import PATH, Person
from lmaas.errors import ApiError, InvalidRequest, TooLarge
from lmaas.http import limited
from lmaas.types import Role

#: The maximum size of a form, and of a body of JSON, in bytes. Prompts of the playground are the longest.
MAX_FORM_BYTES = 4 * 1024 * 1024
MAX_FIELDS = 200
MAX_FILES = 10
#: The header of uploads that a script sends, and the one with the address to go to afterwards.
UPLOAD, REDIRECT = "x-lmaas-upload", "x-lmaas-redirect"
#: The cookie with a message for the next page, such as "The key was revoked."
NOTICE = "lmaas_notice"
MAX_NOTICE = 500

_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")
OPERATORS = frozenset({Role.OPERATOR})
ADMINS = frozenset({Role.TENANT_ADMIN, Role.OPERATOR})
EVERYONE = frozenset(Role)


class Section(StrEnum):
    """The groups of the navigation, in its order."""

    HOME = "Home"
    MODELS = "Models"
    WORK = "Work"
    ACCOUNT = "Account"
    OPERATIONS = "Operations"


class Fields:
    """Values by the names of fields, for templates: `form["name"]` or `form.name`, empty if there is none."""

    def __init__(self, values: Mapping[str, str] | None = None) -> None:
        self._values = dict(values or {})

    def __getitem__(self, name: str) -> str:
        return self._values.get(name, "")

    def __getattr__(self, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __bool__(self) -> bool:
        return bool(self._values)

    def changed(self, **values: str) -> "Fields":
        """Return these fields with other values for some."""
        return Fields({**self._values, **values})

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)


#: The forms of a page that was not sent yet.
NO_FIELDS = Fields()


def errors_of(error: ApiError, fields: Collection[str]) -> Fields:
    """Return the message of an API's error by the field that it names, or by `""` if it names none of these fields."""
    name = (error.param or "").partition(".")[0].partition("[")[0]
    return Fields({name if name in fields else "": error.message})


@dataclass(frozen=True, slots=True)
class Visit:
    """One request to a page: the person, the API with the person's credentials, and the query.

    `api` is about the tenant's own resources; for an operator about those of `tenant`, which the address names (`?tenant=acme`).
    """

    request: Request
    person: Person
    api: ApiClient
    page: "Page"
    templates: Templates
    #: The pages that this person may see.
    pages: tuple["Page", ...]
    #: The tenant that the page is about: the person's own, or the one that an operator has chosen, if any.
    tenant: str | None
    #: The data of a POST: the fields of the form, files among them.
    form_data: FormData = field(default_factory=FormData)

    @property
    def query(self) -> Mapping[str, str]:
        """The query of the address."""
        return self.request.query_params

    @property
    def path(self) -> Mapping[str, str]:
        """The parameters of the path."""
        return self.request.path_params

    @property
    def page_address(self) -> str:
        """The address of the page, about no tenant yet."""
        return PATH + self.page.path

    @property
    def is_part(self) -> bool:
        """True if htmx requests a part of the page."""
        return self.request.headers.get("hx-request") == "true"

    @property
    def form(self) -> Fields:
        """The texts that were typed into the form."""
        return Fields({name: value for name, value in self.form_data.items() if isinstance(value, str)})

    def typed(self, *names: str) -> dict[str, str]:
        """Return those fields of the form that are not empty, without spaces around them."""
        return {name: text for name in names if (text := self.form[name].strip())}

    def choices(self, name: str) -> list[str]:
        """Return the values of a field that may be given several times, such as checkboxes."""
        return [value for value in self.form_data.getlist(name) if isinstance(value, str)]

    def file(self, name: str) -> UploadFile | None:
        """Return an uploaded file, or None if none was chosen."""
        found = self.form_data.get(name)
        return found if isinstance(found, UploadFile) and found.filename else None

    async def json(self) -> Any:
        """Return the JSON that a script has sent. Raises InvalidRequest and TooLarge."""
        if _media_type(self.request) in _FORMS:
            raise InvalidRequest("The body is a form. Send JSON, with the content type application/json.", code="invalid_json")
        receive = limited(self.request.receive, self.request.scope, MAX_FORM_BYTES)
        try:
            return msgspec.json.decode(await Request(self.request.scope, receive).body())
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None

    def href(self, path: str = "", **query: Any) -> str:
        """Return the address of a page of the console, with the tenant that an operator has chosen. Values that are None or empty are left
        out."""
        chosen = {"tenant": self.tenant} if self.person.is_operator and self.tenant else {}
        given = {name: value for name, value in {**chosen, **query}.items() if value is not None and value != ""}
        return PATH + path + (f"?{urlencode(given)}" if given else "")

    def here(self, **query: Any) -> str:
        """Return the address of this page with changes of its query; None removes a value."""
        given = {**dict(self.query), **query}
        return self.href(self.request.scope["path"].removeprefix(PATH), **given)

    def render(self, template: str, /, *, status: int = 200, **context: Any) -> Response:
        """Return the page that a template makes."""
        notice = _read_notice(self.request)
        text = self.templates.render(
            template,
            status=status,
            visit=self,
            person=self.person,
            tenant=self.tenant,
            page=self.page,
            navigation=navigation(self),
            csrf_token=self.person.csrf_token,
            href=self.href,
            here=self.here,
            notice="" if self.is_part else notice,
            **context,
        )
        response = HTMLResponse(text, status)
        if notice and not self.is_part:
            response.delete_cookie(NOTICE, path=PATH)
        return response

    def redirect(self, path: str, notice: str = "", **query: Any) -> Response:
        """Lead to a page after a change, with a message that the page shows."""
        target = self.href(path, **query)
        # A script would follow a redirect by itself, and so read the message in the place of the page that it leads to.
        by_script = UPLOAD in self.request.headers
        response = Response(headers={REDIRECT: target}) if by_script else RedirectResponse(target, 303)
        if notice:
            text = base64.urlsafe_b64encode(notice[:MAX_NOTICE].encode()).decode()
            response.set_cookie(NOTICE, text, max_age=60, path=PATH, httponly=True, samesite="strict")
        return response


Handler = Callable[[Visit], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class PageRoute:
    """A path below `/console` and its handler. `max_bytes` bounds the body of a POST."""

    method: str
    path: str
    handler: Handler
    max_bytes: int = MAX_FORM_BYTES


def get(path: str, handler: Handler) -> PageRoute:
    """Return a route that shows something."""
    return PageRoute("GET", path, handler)


def post(path: str, handler: Handler, *, max_bytes: int = MAX_FORM_BYTES) -> PageRoute:
    """Return a route that changes something. Its CSRF token is checked before the handler runs."""
    return PageRoute("POST", path, handler, max_bytes)


@dataclass(frozen=True, slots=True)
class Page:
    """A page: `path` below `/console`, its entry in the navigation, the roles that see it, and its routes.

    `of_tenant`: the page is about one tenant's resources. An operator chooses the tenant first.
    """

    path: str
    title: str
    section: Section
    roles: frozenset[Role]
    routes: tuple[PageRoute, ...]
    of_tenant: bool = False


def navigation(visit: Visit) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Return the sections with the titles and addresses of their pages, and whether each is the present one."""
    found = []
    for section in Section:
        entries = [(page.title, visit.href(page.path), page is visit.page) for page in visit.pages if page.section is section]
        if entries:
            found.append((section.value, entries))
    return found


async def read_form(request: Request, max_bytes: int) -> FormData:
    """Return the form of a request; an empty one if its body is another thing. Files lie on the disk. Raises ApiError if it is too large.

    The caller closes it.
    """
    if _media_type(request) not in _FORMS:
        return FormData()
    try:
        bounded = Request(request.scope, limited(request.receive, request.scope, max_bytes))
        return await bounded.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FORM_BYTES)
    except TooLarge as error:
        raise ApiError(413, error.message, error.error_code, "") from None


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _read_notice(request: Request) -> str:
    try:
        return base64.urlsafe_b64decode(request.cookies.get(NOTICE, "")).decode()[:MAX_NOTICE]
    except ValueError:
        return ""
