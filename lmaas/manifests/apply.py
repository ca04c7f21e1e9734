"""Makes the service match manifests, through its API. It may be run again at any time."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lmaas.api.table import CREATE_KEY
from lmaas.errors import ApiError, Conflict, LmaasError
from lmaas.manifests.client import ApiClient, Progress, is_sendable
from lmaas.manifests.folder import Manifests
from lmaas.manifests.observe import observe
from lmaas.manifests.plan import Change, FieldChange, Outcome, Send, Upload, plan

_PLANNED = {Outcome.CREATED: "to be created", Outcome.CHANGED: "to be changed"}
_COUNTED = {Outcome.CREATED: "to create", Outcome.CHANGED: "to change", Outcome.UNCHANGED: "unchanged"}
#: The keys of a tenant in the credentials file → their roles.
KEYS = {"api_key": "inference", "admin_key": "tenant_admin"}


#: Shows the progress of an upload during a block, which gets a function that counts bytes.
Uploading = Callable[[Upload], AbstractContextManager[Progress]]


class PartlyApplied(LmaasError):
    """A change failed after others were made. The message has the file, the reason and what was done before."""

    kind, code = "partly_applied", "partly_applied"


def apply(manifests: Manifests, client: ApiClient) -> list[Change]:
    """Make the service match and return what changed. `client` has an operator's key.

    Everything is checked first: InvalidRequest and ApiError mean that nothing was changed. Raises PartlyApplied if a change then fails.
    """
    changes = plan(manifests, observe(manifests, client))
    execute(changes, client)
    return changes


def _silent(_: Upload) -> AbstractContextManager[Progress]:
    return nullcontext(lambda _: None)


def execute(
    changes: Sequence[Change], client: ApiClient, *, report: Callable[[Change], None] = lambda _: None, uploading: Uploading = _silent
) -> None:
    """Make the changes of a plan, in its order. Raises PartlyApplied at the first one that fails.

    `report` is called with each change that has been made, and `uploading` for each upload.
    """
    done: list[str] = []
    for change in changes:
        sent = 0
        try:
            for request in change.requests:
                _send(request, client, uploading)
                sent += 1
        except (ApiError, LmaasError, OSError) as error:
            if sent:
                done.append(f"{change.thing} {change.name} in part")
            before = f"Done before: {', '.join(done)}." if done else "Nothing was changed before."
            reference = f" ({error.code}, {error.request_id})" if isinstance(error, ApiError) and error.request_id else ""
            raise PartlyApplied(
                f"{change.path}: {change.thing} {change.name}: {_reason(error)}{reference}\n"
                f"{before} Once the cause is removed, run it again: it continues from here."
            ) from error
        if sent:
            done.append(f"{change.thing} {change.name} {change.outcome}")
            report(change)


def _reason(error: ApiError | LmaasError | OSError) -> str:
    if not isinstance(error, OSError):
        return error.message
    return f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}."


def _send(request: Send | Upload, client: ApiClient, uploading: Uploading) -> None:
    if isinstance(request, Send):
        client.send_to(request.operation, request.path, request.body)
        return
    tenant = client.for_tenant(request.tenant)
    with uploading(request) as progress:
        answer = tenant.upload(request.adapter, request.base_model, request.folder, activate=request.activate, progress=progress)
    if answer["version"] != request.version and not request.activate:
        raise Conflict(f"The folder became version {answer['version']}, not {request.version}, because of another upload at the same time.")


def described(change: Change) -> list[str]:
    """Return a change that was made as lines for people: what happened to which thing, its old and new values, and notes."""
    return _lines(change, change.outcome, [item for item in change.fields if not item.is_new])


def planned(change: Change) -> list[str]:
    """Return a change of a plan as lines for people; none for what stays as it is, unless there is a note."""
    if change.outcome is Outcome.UNCHANGED and not change.notes:
        return []
    return _lines(change, _PLANNED.get(change.outcome, change.outcome), change.fields)


def summary(changes: Sequence[Change]) -> str:
    """Return a sentence with the numbers of what a plan would do."""
    counts = {words: sum(change.outcome is outcome for change in changes) for outcome, words in _COUNTED.items()}
    return f"Plan: {', '.join(f'{count} {words}' for words, count in counts.items() if count)}."


def _lines(change: Change, outcome: str, fields: Sequence[FieldChange]) -> list[str]:
    values = [f"  {item.field}: {_words(item)}" for item in fields]
    return [f"{change.thing} {change.name}: {outcome}", *values, *(f"  {note}" for note in change.notes)]


def _words(item: FieldChange) -> str:
    return _word(item.new) if item.is_new else f"{_word(item.old)} → {_word(item.new)}"


def _word(value: Any) -> str:
    return "none" if value is None or value == "" else str(value)


def working_keys(tenant: str, known: Any, client: ApiClient) -> dict[str, str]:
    """Return a tenant's `api_key` and `admin_key`: the known ones if they work, otherwise new ones."""
    keys = _working(known, client)
    for name, role in KEYS.items():
        if name not in keys:
            keys[name] = str(client.send(CREATE_KEY, {"role": role, "name": "lmaas up"}, tenant=tenant)["key"])
    return {name: keys[name] for name in KEYS}


def working_credentials(known: Mapping[str, Any], tenants: Sequence[str], client: ApiClient) -> dict[str, dict[str, str]]:
    """Return the keys of the credentials file by tenant: both keys of each of `tenants`, and after them those keys of other tenants that
    still work. The keys of a deleted tenant do not."""
    found = {tenant: working_keys(tenant, known.get(tenant), client) for tenant in tenants}
    others = {tenant: _working(keys, client) for tenant, keys in known.items() if tenant not in found}
    return found | {tenant: keys for tenant, keys in others.items() if keys}


def _working(keys: Any, client: ApiClient) -> dict[str, str]:
    """Return those of a tenant's keys that work. The file may have been edited."""
    known = keys if isinstance(keys, dict) else {}
    named = {name: known[name] for name in KEYS if isinstance(known.get(name), str) and is_sendable(known[name]) and known[name]}
    return {name: key for name, key in named.items() if client.with_key(key).works()}
