"""Keys: the list, a new key that is shown once, limits and expiry, and revocation."""

from typing import Any

from starlette.responses import Response

from lmaas.api.operation import Operation
from lmaas.api.table import CHANGE_KEY, CREATE_KEY, CREATE_OPERATOR_KEY, LIST_KEYS, LIST_OPERATOR_KEYS, REVOKE_KEY, REVOKE_OPERATOR_KEY
from lmaas.console.command import command
from lmaas.console.numbers import number_or_text
from lmaas.console.page import ADMINS, NO_FIELDS, Fields, Page, Section, Visit, errors_of, get, post
from lmaas.errors import ApiError

PATH = "/keys"
PAGE_SIZE = 50
#: The names of the limits, with their labels.
LIMITS = (
    ("requests_per_minute", "Requests per minute"),
    ("tokens_per_minute", "Tokens per minute"),
    ("max_concurrent", "Requests at once"),
    ("tokens_per_month", "Tokens per month"),
    ("budget_per_month", "Budget per month, in micro-dollars"),
)
#: Choices of the form: seconds, and what they mean.
LIFETIMES = (
    ("", "It does not expire"),
    ("86400", "1 day"),
    ("604800", "7 days"),
    ("2592000", "30 days"),
    ("7776000", "90 days"),
    ("31536000", "1 year"),
)
#: For a change: an empty choice keeps the expiry as it is.
CHANGED_LIFETIMES = (("", "As it is"), ("0", "It does not expire"), *LIFETIMES[1:])
_FIELDS = ("name", "role", "expires_in_s", *(name for name, _ in LIMITS))


def _of_operators(visit: Visit) -> bool:
    """Return whether the page is about the operators' own keys."""
    return visit.person.is_operator and visit.tenant is None


def _operation(visit: Visit, of_tenant: Operation, of_operators: Operation) -> Operation:
    return of_operators if _of_operators(visit) else of_tenant


async def show(visit: Visit) -> Response:
    """Show a page of the keys."""
    return await _shown(visit, Fields({"role": "inference"}))


async def _shown(
    visit: Visit, form: Fields, errors: Fields = NO_FIELDS, *, changed: str = "", created: dict[str, Any] | None = None, status: int = 200
) -> Response:
    """Show the list. `changed` is the key whose form `form` and `errors` are; otherwise they are those of a new key."""
    listing = _operation(visit, LIST_KEYS, LIST_OPERATOR_KEYS)
    found = await visit.api.read_all(keys=visit.api.send(listing, query={"limit": PAGE_SIZE, "after": visit.query.get("after")}))
    return visit.render(
        "keys.html",
        status=status,
        of_operators=_of_operators(visit),
        limits=LIMITS,
        lifetimes=LIFETIMES,
        changed_lifetimes=CHANGED_LIFETIMES,
        form=form,
        errors=errors,
        changed=changed,
        created=created,
        list_command=_command(visit, "key", "list"),
        create_command=_command(visit, "key", "create", "--name", "NAME", *([] if _of_operators(visit) else ["--role", "inference"])),
        **found,
    )


def _command(visit: Visit, *words: str) -> str:
    tenant = ["--tenant", visit.tenant] if visit.person.is_operator and visit.tenant else []
    return command(visit, *tenant, *words)


def _body(visit: Visit) -> dict[str, Any]:
    numbers = ("expires_in_s", *(name for name, _ in LIMITS))
    return {name: number_or_text(text) for name, text in visit.typed(*numbers).items()}


async def create(visit: Visit) -> Response:
    """Create a key and show it, which happens only now."""
    body: dict[str, Any] = {"name": visit.form.name.strip()} | _body(visit)
    if not _of_operators(visit):
        body["role"] = visit.form.role
    try:
        created = await visit.api.send(_operation(visit, CREATE_KEY, CREATE_OPERATOR_KEY), body)
    except ApiError as error:
        if error.status == 401:
            raise
        return await _shown(visit, visit.form, errors_of(error, _FIELDS), status=error.status)
    return await _shown(visit, Fields({"role": "inference"}), created=created)


async def change(visit: Visit) -> Response:
    """Change the limits and the expiry of a tenant's key. An empty limit is none of its own."""
    key = visit.path["key"]
    limits = {name: None for name, _ in LIMITS}
    try:
        changed = await visit.api.send(CHANGE_KEY, limits | _body(visit), key=key)
    except ApiError as error:
        if error.status in (401, 404):
            raise
        return await _shown(visit, visit.form, errors_of(error, _FIELDS), changed=key, status=error.status)
    return visit.redirect(PATH, f"The key {changed['name'] or changed['prefix']} was changed.")


async def revoke(visit: Visit) -> Response:
    """Revoke a key."""
    try:
        revoked = await visit.api.send(_operation(visit, REVOKE_KEY, REVOKE_OPERATOR_KEY), key=visit.path["key"])
    except ApiError as error:
        if error.code != "last_operator_key":
            raise
        return await _shown(visit, Fields({"role": "inference"}), Fields({"": error.message}), status=error.status)
    return visit.redirect(PATH, f"The key {revoked['name'] or revoked['prefix']} was revoked. It stops working within a second.")


PAGE = Page(
    PATH,
    "Keys",
    Section.ACCOUNT,
    ADMINS,
    (get(PATH, show), post(PATH, create), post(f"{PATH}/{{key}}/change", change), post(f"{PATH}/{{key}}/revoke", revoke)),
)
