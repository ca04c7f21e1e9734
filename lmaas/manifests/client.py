"""A client of our own HTTP API, for the CLI and for manifests."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

import httpx

from lmaas.adapters.config import CONFIG_FILE
from lmaas.adapters.safetensors import MODEL_FILE
from lmaas.errors import ApiError, InvalidRequest, SettingsError

Progress = Callable[[int], None]


class ApiClient:
    """Calls the service at `base_url` (which ends in `/v1`) with one key. An operator names the `tenant` whose resources are meant."""

    def __init__(self, base_url: str, key: str, tenant: str | None = None) -> None:
        self._root = base_url.removesuffix("/").removesuffix("/v1")
        # A proxy that the environment names does not lead to this machine.
        local = urlsplit(self._root).hostname in ("127.0.0.1", "localhost", "::1")
        timeout = httpx.Timeout(60, write=600)
        self._http = httpx.Client(headers={"authorization": f"Bearer {key}"}, timeout=timeout, trust_env=not local)
        self._tenant = tenant

    def for_tenant(self, tenant: str) -> "ApiClient":
        """Return a client of the same operator for a tenant's resources."""
        client = ApiClient(self._root, "", tenant)
        client._http = self._http
        return client

    def with_key(self, key: str) -> "ApiClient":
        """Return a client of the same service with another key."""
        return ApiClient(self._root, key)

    def works(self) -> bool:
        """Return whether the key is valid."""
        try:
            self.call("GET", "/v1/models")
        except ApiError as error:
            if error.status == 401:
                return False
            raise
        return True

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def call(self, method: str, path: str, **options: Any) -> Any:
        """Send a request and return the JSON of its response. Raises ApiError, or SettingsError if the service cannot be reached."""
        try:
            response = self._http.request(method, self._root + path, **options)
        except ValueError as error:
            raise InvalidRequest(f"This cannot be sent: {error}") from error
        except httpx.TransportError as error:
            raise SettingsError(f"The service at {self._root} does not answer: {error}") from error
        try:
            answer = response.json()
        except ValueError:
            raise ApiError(response.status_code, response.text[:200], "", "") from None
        if response.status_code >= 400:
            said = answer.get("error", {})
            request_id = response.headers.get("x-request-id", "")
            raise ApiError(response.status_code, said.get("message", ""), said.get("code", ""), request_id, said.get("param"))
        return answer

    def own(self, path: str) -> str:
        """Return the path of a resource of the key's tenant, or of the tenant that the operator named."""
        return f"/v1{path}" if self._tenant is None else f"/admin/v1/tenants/{quote(self._tenant, safe='')}{path}"

    def list(self, path: str, **query: Any) -> list[dict[str, Any]]:
        """Return the items of a list."""
        data: list[dict[str, Any]] = self.call("GET", path, params={name: value for name, value in query.items() if value is not None})[
            "data"
        ]
        return data

    def upload(
        self, name: str, base_model: str, folder: Path, *, activate: bool = True, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Upload an adapter's folder as PEFT saves it; return the adapter with its version, which is an earlier one if it has the same
        content. Raises InvalidRequest if a file is missing."""
        fields = {"name": name, "base_model": base_model, "activate": str(activate).lower()}
        return self._send_adapter(self.own("/adapters"), folder, fields, progress)

    def check_adapter(self, folder: Path, base: dict[str, str]) -> dict[str, Any]:
        """Have the service check an adapter's folder without storing it; return what it would store. `base` has the name of the base model
        (`base_model`) or the JSON of one that does not exist yet (`definition`). Raises InvalidRequest if a file is missing."""
        return self._send_adapter("/admin/v1/check-adapter", folder, base)

    def _send_adapter(self, path: str, folder: Path, fields: dict[str, str], progress: Progress | None = None) -> dict[str, Any]:
        config, model = folder / CONFIG_FILE, folder / MODEL_FILE
        for needed in (config, model):
            if not needed.is_file():
                raise InvalidRequest(f"There is no {needed}. Save the adapter with PEFT's save_pretrained(..., safe_serialization=True).")
        with model.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            files = {
                "adapter_config": (CONFIG_FILE, config.read_bytes(), "application/json"),
                "adapter_model": (MODEL_FILE, _Counted(file, progress or (lambda _: None)), "application/octet-stream"),
            }
            answer: dict[str, Any] = self.call("POST", path, data=fields | {"sha256": digest}, files=files)
        return answer


class _Counted(io.RawIOBase):
    """A file that reports how much of it has been read."""

    def __init__(self, file: BinaryIO, progress: Progress) -> None:
        self._file, self._progress = file, progress

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        chunk = self._file.read(size)
        self._progress(len(chunk))
        return chunk

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a place."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The present place."""
        return self._file.tell()

    def fileno(self) -> int:
        """The file's descriptor, from which its length is known."""
        return self._file.fileno()
