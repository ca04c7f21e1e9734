"""The changes of a plan are made in order, and an error reports the changes before it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lmaas.api import table
from lmaas.api.operation import Operation
from lmaas.errors import ApiError, SettingsError
from lmaas.manifests.apply import PartlyApplied, execute, working_credentials
from lmaas.manifests.client import ApiClient
from lmaas.manifests.plan import Change, Outcome, Send, Upload

FILE, FOLDER = Path("tenants/acme.yaml"), Path("bot")
BOT = {"tenant": "acme", "name": "bot"}
TENANT = Change("tenant", "acme", Outcome.CREATED, FILE, requests=(Send(table.CREATE_TENANT, {"name": "acme"}),))
SAME = Change("tenant", "globex", Outcome.UNCHANGED, Path("tenants/globex.yaml"))


def bot(version: int, *, pinned: bool) -> Change:
    upload = Upload("acme", "bot", "base", FOLDER, version, activate=not pinned)
    activation = (Send(table.ACTIVATE_VERSION, {"version": version}, BOT),) if pinned else ()
    return Change("adapter", "acme/bot", Outcome.CHANGED, FILE, requests=(upload, *activation))


class Service(ApiClient):
    """A client with fixed responses by operation, and `upload` for uploads. A missing one is an empty response."""

    def __init__(self, **answers: Any) -> None:
        super().__init__("http://127.0.0.1:1", "")
        self.close()
        self.calls: list[tuple[Any, ...]] = []
        self._answers = answers

    def _answer(self, name: str) -> Any:
        answer = self._answers.get(name, {})
        if isinstance(answer, Exception):
            raise answer
        return answer

    def send_to(
        self,
        operation: Operation,
        path: Mapping[str, str],
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the operation's response."""
        assert query is None
        self.calls.append((operation.id, dict(path), body))
        answer: dict[str, Any] = self._answer(operation.id)
        return answer

    def for_tenant(self, tenant: str) -> "Service":
        """Return the same client for any tenant."""
        self.calls.append(("tenant", tenant))
        return self

    def upload(self, name: str, base_model: str, folder: Path, *, activate: bool = True, **_: Any) -> dict[str, Any]:
        """Return the response to an upload."""
        self.calls.append(("upload", name, base_model, folder, activate))
        answer: dict[str, Any] = self._answer("upload")
        return answer


def test_requests_are_sent_in_the_order_of_the_plan() -> None:
    service = Service(upload={"version": 2})
    execute([TENANT, SAME, bot(2, pinned=True)], service)
    assert service.calls == [
        ("create_tenant", {}, {"name": "acme"}),
        ("tenant", "acme"),
        ("upload", "bot", "base", FOLDER, False),
        ("activate_version", BOT, {"version": 2}),
    ]


REFUSED = ApiError(503, "The adapter store is away.", "object_store_unavailable", "req_1")


@pytest.mark.parametrize(
    ("changes", "answers", "reason", "before"),
    [
        (
            [TENANT],
            {"create_tenant": SettingsError("The service does not answer.")},
            "tenant acme: The service does not answer.",
            "Nothing was changed before.",
        ),
        (
            [TENANT, SAME, bot(1, pinned=False)],
            {"upload": REFUSED},
            "adapter acme/bot: The adapter store is away. (object_store_unavailable, req_1)",
            "Done before: tenant acme created.",
        ),
        (
            [bot(1, pinned=True)],
            {"upload": {"version": 1}, "activate_version": REFUSED},
            "adapter acme/bot: The adapter store is away. (object_store_unavailable, req_1)",
            "Done before: adapter acme/bot in part.",
        ),
        (
            [TENANT, bot(1, pinned=False)],
            {"upload": OSError(5, "Input/output error", "bot/adapter_model.safetensors")},
            "adapter acme/bot: bot/adapter_model.safetensors: Input/output error.",
            "Done before: tenant acme created.",
        ),
        # Another upload at the same time must not replace a pinned version.
        (
            [bot(2, pinned=True)],
            {"upload": {"version": 3}},
            "adapter acme/bot: The folder became version 3, not 2, because of another upload at the same time.",
            "Nothing was changed before.",
        ),
    ],
)
def test_a_failure_names_the_file_and_what_was_done(changes: list[Change], answers: dict[str, Any], reason: str, before: str) -> None:
    with pytest.raises(PartlyApplied) as raised:
        execute(changes, Service(**answers))
    assert raised.value.message.splitlines() == [
        f"{FILE}: {reason}",
        f"{before} Once the cause is removed, run it again: it continues from here.",
    ]


def test_an_upload_that_is_live_at_once_may_have_another_number() -> None:
    execute([bot(2, pinned=False)], Service(upload={"version": 3}))


class Keys(Service):
    """A service at which these keys are valid."""

    def __init__(self, *keys: str) -> None:
        super().__init__(create_key={"key": "new"})
        self._keys, self._key = keys, ""

    def with_key(self, key: str) -> "Keys":
        """Return a client with another key."""
        other = Keys(*self._keys)
        other._key = key
        return other

    def works(self) -> bool:
        """Return whether the key is one of them."""
        return self._key in self._keys


def test_credentials_are_of_keys_that_work() -> None:
    service = Keys("a", "b", "c")
    known = {
        "gone": {"api_key": "x", "admin_key": "y"},
        "half": {"api_key": "b", "admin_key": "y"},
        "acme": {"api_key": "a", "admin_key": "x", "other": "z"},
        "edited": {"api_key": 5, "admin_key": "c\nd"},
        "odd": None,
    }
    found = working_credentials(known, ["globex", "acme", "odd"], service)
    new = {"api_key": "new", "admin_key": "new"}
    assert list(found.items()) == [
        ("globex", new),
        ("acme", {"api_key": "a", "admin_key": "new"}),
        ("odd", new),
        ("half", {"api_key": "b"}),
    ]
    assert [body["role"] for _, _, body in service.calls] == ["inference", "tenant_admin", "tenant_admin", "inference", "tenant_admin"]
