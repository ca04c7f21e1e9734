"""Makes the service match manifests, through its API. It may be run again at any time."""

from collections.abc import Mapping, Sequence
from typing import Any

from lmaas.api.table import CREATE_KEY
from lmaas.errors import ApiError, Conflict, LmaasError
from lmaas.manifests.client import ApiClient, is_sendable
from lmaas.manifests.folder import Manifests
from lmaas.manifests.observe import observe
from lmaas.manifests.plan import Change, Outcome, Send, Upload, plan

_PLANNED = {Outcome.CREATED: "would be created", Outcome.CHANGED: "would be changed"}
#: The keys of a tenant in the credentials file → their roles.
KEYS = {"api_key": "inference", "admin_key": "tenant_admin"}


class PartlyApplied(LmaasError):
    """A change failed after others were made. The message has the file, the reason and what was done before."""

    kind, code = "partly_applied", "partly_applied"


def apply(manifests: Manifests, client: ApiClient, *, dry_run: bool = False) -> list[Change]:
    """Make the service match and return what changed; with `dry_run`, change nothing. `client` has an operator's key.

    Everything is checked first: InvalidRequest and ApiError mean that nothing was changed. Raises PartlyApplied if a change then fails.
    """
    changes = plan(manifests, observe(manifests, client))
    if not dry_run:
        execute(changes, client)
    return changes


def execute(changes: Sequence[Change], client: ApiClient) -> None:
    """Make the changes of a plan, in its order. Raises PartlyApplied at the first one that fails."""
    done: list[str] = []
    for change in changes:
        sent = 0
        try:
            for request in change.requests:
                _send(request, client)
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


def _reason(error: ApiError | LmaasError | OSError) -> str:
    if not isinstance(error, OSError):
        return error.message
    return f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}."


def _send(request: Send | Upload, client: ApiClient) -> None:
    if isinstance(request, Send):
        client.send_to(request.operation, request.path, request.body)
        return
    tenant = client.for_tenant(request.tenant)
    answer = tenant.upload(request.adapter, request.base_model, request.folder, activate=request.activate)
    if answer["version"] != request.version and not request.activate:
        raise Conflict(f"The folder became version {answer['version']}, not {request.version}, because of another upload at the same time.")


def described(change: Change, *, dry_run: bool = False) -> list[str]:
    """Return a change as lines for people: what happens to which thing, its fields with old and new values, and notes."""
    outcome = _PLANNED.get(change.outcome, change.outcome) if dry_run else change.outcome
    fields = [f"  {item.field}: {_word(item.old)} → {_word(item.new)}" for item in change.fields]
    return [f"{change.thing} {change.name}: {outcome}", *fields, *(f"  {note}" for note in change.notes)]


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
