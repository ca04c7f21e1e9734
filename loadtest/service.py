"""The service under load, with its operator's access."""

import json
import re
import time
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import httpx

from lmaas.api import table
from lmaas.config import Settings
from lmaas.errors import ApiError, SettingsError
from lmaas.manifests.client import ApiClient
from lmaas.states import PoolKind

POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Service:
    """A running service, with the `key` that the run was given: an operator's, or a tenant's. `keys` are those of the credentials file, by
    tenant."""

    root: str
    key: str
    client: ApiClient
    is_operator: bool
    keys: dict[str, str]
    #: The base model under load.
    model: str
    #: Its folder on the service's machine. Empty if only a tenant's key is known.
    source: str = ""
    #: True if only its adapters are called, because an option names it.
    is_named: bool = False

    @property
    def operator(self) -> ApiClient:
        """A client with the operator's key. Raises SettingsError if there is only a tenant's."""
        if not self.is_operator:
            raise SettingsError(
                "This needs an operator's key: set LMAAS_API_KEY or --key to one, or use the scenario steady with --tenants 0."
            )
        return self.client

    def models(self, key: str) -> list[dict[str, Any]]:
        """Return the models that a tenant's key may call and that generate text. Raises SettingsError."""
        answer = httpx.get(f"{self.root}/v1/models", headers={"authorization": f"Bearer {key}"}, timeout=30)
        if answer.is_error:
            raise SettingsError(f"{self.root}/v1/models answered with {answer.status_code}. Check LMAAS_URL and LMAAS_API_KEY.")
        return [row for row in answer.json()["data"] if row["kind"] == PoolKind.GENERATE]

    def to_zero(self, timeout_s: float) -> None:
        """Drain and stop every replica of the model, and wait until none is left. Raises SettingsError if one remains."""
        for row in self.replicas():
            self.operator.send(table.STOP_REPLICA, replica=row["id"])
        deadline = time.monotonic() + timeout_s
        while self.replicas():
            if time.monotonic() > deadline:
                raise SettingsError(f"The pool of {self.model} is not empty after {timeout_s:g} s. Stop its other clients and try again.")
            time.sleep(POLL_S)

    def replicas(self) -> list[dict[str, Any]]:
        """Return the model's replicas that have not ended."""
        return [row for row in self.operator.items(table.LIST_REPLICAS) if row["base_model"] == self.model]

    def in_flight(self) -> int:
        """Return the number of requests that the gateway holds, by its metrics."""
        text = httpx.get(self.root + "/metrics", timeout=10).raise_for_status().text
        found = re.search(r"^lmaas_requests_in_flight (\S+)$", text, re.MULTILINE)
        if found is None:
            raise SettingsError(f"{self.root}/metrics does not say how many requests are in flight.")
        return int(float(found[1]))


def connect(settings: Settings, url: str | None = None, key: str | None = None, model: str | None = None) -> Service:
    """Connect to the service of this address and key, by default `LMAAS_URL` and `LMAAS_API_KEY`, or those of this home.

    `model` names the base model under load, by default the first one that generates text. Raises SettingsError and ApiError.
    """
    url, key, keys = url or settings.url, key or settings.api_key, dict[str, str]()
    if bool(url) != bool(key):
        raise SettingsError("Give both an address and a key (LMAAS_URL and LMAAS_API_KEY, or --url and --key), or neither.")
    if not url or not key:
        try:
            credentials = json.loads(settings.credentials_path.read_text())
            url, key = str(credentials["base_url"]), str(credentials["operator_key"])
            keys = {tenant: found["api_key"] for tenant, found in credentials["tenants"].items()}
        except (OSError, ValueError, KeyError):
            raise SettingsError(
                f"There are no credentials in {settings.credentials_path}. Run `make up` in another terminal, or set LMAAS_URL and "
                "LMAAS_API_KEY to a service and a key."
            ) from None
    client, root = ApiClient(url, key), url.strip().removesuffix("/").removesuffix("/v1")
    wanted = model or settings.model_name
    try:
        client.send(table.LIST_OPERATOR_KEYS, query={"limit": 1})
    except ApiError as error:
        if error.status != HTTPStatus.FORBIDDEN:
            raise
        service = Service(root, key, client, is_operator=False, keys=keys, model="", is_named=model is not None)
        names = [row["id"] for row in service.models(key) if row["parent"] is None]
        return replace(service, model=_chosen(names, wanted))
    models = {row["name"]: row["source"] for row in client.items(table.LIST_MODELS) if row["kind"] == PoolKind.GENERATE}
    name = _chosen(list(models), wanted)
    return Service(root, key, client, is_operator=True, keys=keys, model=name, source=models[name], is_named=model is not None)


def _chosen(names: list[str], wanted: str | None) -> str:
    """Return the name of the base model under load. Raises SettingsError."""
    found = [name for name in names if wanted in (None, name)]
    if not found:
        raise SettingsError(f"The service has no base model {wanted or ''} that generates text.")
    return found[0]
