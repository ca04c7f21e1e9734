"""The service under load, with its operator's access."""

import json
import re
import time
from dataclasses import dataclass
from typing import Any

import httpx

from lmaas.api import table
from lmaas.config import Settings
from lmaas.errors import SettingsError
from lmaas.manifests.client import ApiClient
from lmaas.states import PoolKind

POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Service:
    """A running service. `operator` is a client with the operator's key, `keys` the keys of existing tenants, by tenant."""

    root: str
    operator: ApiClient
    keys: dict[str, str]
    #: The base model under load.
    model: str
    #: Its folder on the service's machine.
    source: str

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


def connect(settings: Settings) -> Service:
    """Connect to the service of `LMAAS_URL` and an operator's `LMAAS_API_KEY`, or that of this home. Raises SettingsError, ApiError."""
    if bool(settings.url) != bool(settings.api_key):
        raise SettingsError("Set both LMAAS_URL and LMAAS_API_KEY, or neither.")
    if settings.url and settings.api_key:
        url, key, keys = settings.url, settings.api_key, {}
    else:
        try:
            credentials = json.loads(settings.credentials_path.read_text())
            url, key = credentials["base_url"], credentials["operator_key"]
            keys = {tenant: found["api_key"] for tenant, found in credentials["tenants"].items()}
        except (OSError, ValueError, KeyError):
            raise SettingsError(
                f"There are no credentials in {settings.credentials_path}. Run `make up` in another terminal, or set LMAAS_URL and "
                "LMAAS_API_KEY to a service and an operator's key."
            ) from None
    operator = ApiClient(url, key)
    models = operator.items(table.LIST_MODELS)
    wanted = [row for row in models if settings.model_name in (None, row["name"]) and row["kind"] == PoolKind.GENERATE]
    if not wanted:
        raise SettingsError(f"The service has no base model {settings.model_name or ''} that generates text.")
    return Service(url.removesuffix("/").removesuffix("/v1"), operator, keys, wanted[0]["name"], wanted[0]["source"])
