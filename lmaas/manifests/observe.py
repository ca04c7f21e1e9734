"""The input of the plan: the state of the service, and its answers to dry runs of the manifests."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus

from lmaas.api import table
from lmaas.errors import ApiError, InvalidRequest
from lmaas.manifests import models, tenants
from lmaas.manifests.client import ApiClient
from lmaas.manifests.folder import Manifests
from lmaas.manifests.models import ModelManifest
from lmaas.manifests.plan import KnownAdapter, Observed, Shown, request_for
from lmaas.manifests.tenants import AdapterManifest, TenantManifest
from lmaas.types import Role

#: The statuses of a refusal that is about the manifest; any other failure ends the observation.
_REFUSED = frozenset({
    HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY,
})  # fmt: skip
#: If one of these changes, an adapter is checked against the base model as it will be.
_VALIDATED = ("source", "dtype", "max_lora_rank")


def observe(manifests: Manifests, client: ApiClient) -> Observed:
    """Read from the service, with an operator's key, everything that the plan needs. Nothing is changed.

    Raises ApiError, or SettingsError if the service cannot be reached. Its refusals of manifests are in `refusals`.
    """
    return _Observation(manifests, client).run()


@dataclass(slots=True)
class _Observation:
    manifests: Manifests
    client: ApiClient
    refusals: list[str] = field(default_factory=list)

    def run(self) -> Observed:
        known_models = {row["name"]: row for row in self.client.items(table.LIST_MODELS)}
        known_tenants = {row["name"]: row for row in self.client.items(table.LIST_TENANTS)}
        proposed_models = self._proposed(self.manifests.models, known_models)
        proposed_tenants = self._proposed(self.manifests.tenants, known_tenants)
        adapters = {tenant.name: self._adapters(tenant) for tenant in self.manifests.tenants if tenant.name in known_tenants}
        contents = {}
        for tenant in self.manifests.tenants:
            for entry in tenant.adapters:
                content = self._content(tenant, entry, known_models, proposed_models)
                if content is not None:
                    contents[tenant.name, entry.name] = content
        return Observed(known_models, known_tenants, adapters, proposed_models, proposed_tenants, contents, tuple(self.refusals))

    def _proposed(self, manifests: tuple[ModelManifest, ...] | tuple[TenantManifest, ...], known: dict[str, Shown]) -> dict[str, Shown]:
        """Return the base model or tenant that each manifest would result in; without those that are refused."""
        proposed: dict[str, Shown] = {}
        for manifest in manifests:
            request = request_for(manifest, exists=manifest.name in known)
            with self._refusing(f"{manifest.path}: ", models.FIELDS if isinstance(manifest, ModelManifest) else tenants.FIELDS):
                proposed[manifest.name] = self.client.send_to(request.operation, request.path, request.body, {"dry_run": True})
        return proposed

    def _adapters(self, tenant: TenantManifest) -> dict[str, KnownAdapter]:
        client = self.client.for_tenant(tenant.name)
        mine = {entry.name for entry in tenant.adapters}
        found = {}
        for row in client.items(table.LIST_ADAPTERS):
            versions = client.items(table.LIST_VERSIONS, name=row["name"]) if row["name"] in mine else []
            contents = {version["version"]: version["content_hash"] for version in versions}
            found[row["name"]] = KnownAdapter(row["base_model"], row["live_version"], contents, row["activated_by"] == Role.TENANT_ADMIN)
        return found

    def _content(self, tenant: TenantManifest, entry: AdapterManifest, known: dict[str, Shown], proposed: dict[str, Shown]) -> str | None:
        """The hash that an adapter's folder has once it is stored; None if that cannot be known."""
        if entry.folder is None:
            return None
        definition = None
        for manifest in self.manifests.models:
            if manifest.name != entry.base_model:
                continue
            if manifest.name not in proposed:
                return None  # The base model itself is refused.
            before, after = known.get(manifest.name), proposed[manifest.name]
            if before is None or any(before[name] != after[name] for name in _VALIDATED):
                definition = json.dumps({"name": manifest.name} | manifest.body)
        if definition is None and entry.base_model not in known:
            return None  # The plan mentions it.
        base = {"base_model": entry.base_model} if definition is None else {"definition": definition}
        with self._refusing(f"{tenant.path}: '{entry.where}': {entry.folder}: ", {}):
            return str(self.client.check_adapter(entry.folder, base)["content_hash"])
        return None

    @contextmanager
    def _refusing(self, where: str, words: dict[str, str]) -> Iterator[None]:
        """Note a refusal with its file, and with the manifest's word for the field."""
        try:
            yield
        except InvalidRequest as error:  # also of a file that cannot be read
            self.refusals.append(f"{where}{error.message}")
        except ApiError as error:
            word = words.get(error.param or "", error.param)
            message = error.message if error.param is None else error.message.replace(f"'{error.param}'", f"'{word}'")
            if error.status not in _REFUSED:
                raise ApiError(error.status, f"{where}{message}", error.code, error.request_id) from error
            prefix = "" if word is None or f"'{word}'" in message or not words else f"'{word}': "
            self.refusals.append(f"{where}{prefix}{message}")
