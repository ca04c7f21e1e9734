"""A client of the management API, for the CLI and for manifests. Methods and paths come from the table of operations."""

import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import httpx

from lmaas.adapters.config import CONFIG_FILE
from lmaas.adapters.safetensors import MODEL_FILE
from lmaas.api.operation import Operation, filled
from lmaas.api.shapes.common import MAX_PAGE
from lmaas.api.table import CHECK_ADAPTER, UPLOAD_ADAPTER
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
            self._call("GET", "/v1/models")
        except ApiError as error:
            if error.status == 401:
                return False
            raise
        return True

    def check_ready(self) -> None:
        """Raise ApiError unless the service is ready."""
        self._call("GET", "/readyz")

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send(
        self, operation: Operation, body: Mapping[str, Any] | None = None, *, query: Mapping[str, Any] | None = None, **path: str
    ) -> dict[str, Any]:
        """Call an operation and return the JSON of its answer; `path` has the parameters of its path. Otherwise as `send_to`."""
        return self.send_to(operation, path, body, query)

    def send_to(
        self,
        operation: Operation,
        path: Mapping[str, str],
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Call an operation and return the JSON of its answer.

        An operation on a tenant's resources is about the tenant in `path`, otherwise about the client's, otherwise about the key's own.
        Values of the query that are None are not sent. Raises ApiError, or SettingsError if the service cannot be reached.
        """
        params = {name: _text(value) for name, value in (query or {}).items() if value is not None}
        answer: dict[str, Any] = self._call(operation.method, self._address(operation, path), params=params, json=body)
        return answer

    def items(
        self, operation: Operation, *, most: int | None = None, query: Mapping[str, Any] | None = None, **path: str
    ) -> list[dict[str, Any]]:
        """Return all items of a list, or at most `most`, page by page. Raises as `send`."""
        found: list[dict[str, Any]] = []
        after = None
        while True:
            page = {"limit": MAX_PAGE if most is None else min(most - len(found), MAX_PAGE), "after": after} if operation.is_paged else {}
            answer = self.send_to(operation, path, query={**(query or {}), **page})
            found += answer["data"]
            if not answer.get("has_more") or (most is not None and len(found) >= most):
                return found
            after = answer["last_id"]

    def _address(self, operation: Operation, path: Mapping[str, str]) -> str:
        owner = {} if self._tenant is None else {"tenant": self._tenant}
        named = owner | dict(path)
        of_tenant = operation.operator_path
        return filled(of_tenant if of_tenant is not None and "tenant" in named else operation.path, named)

    def _call(self, method: str, path: str, **options: Any) -> Any:
        try:
            response = self._http.request(method, self._root + path, **options)
        except ValueError as error:
            raise InvalidRequest(f"This cannot be sent: {error}") from error
        except httpx.TransportError as error:
            raise SettingsError(
                f"The service at {self._root} cannot be reached ({error}). Start it with `lmaas up`, or set LMAAS_URL and LMAAS_API_KEY."
            ) from error
        try:
            answer = response.json()
        except ValueError:
            raise ApiError(response.status_code, response.text[:200], "", "") from None
        if response.status_code >= 400:
            said = answer.get("error", {})
            request_id = response.headers.get("x-request-id", "")
            raise ApiError(response.status_code, said.get("message", ""), said.get("code", ""), request_id, said.get("param"))
        return answer

    def upload(
        self, name: str, base_model: str, folder: Path, *, activate: bool = True, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Upload an adapter's folder as PEFT saves it; return the adapter with its version, which is an earlier one if it has the same
        content. Raises InvalidRequest if a file is missing."""
        fields = {"name": name, "base_model": base_model, "activate": str(activate).lower()}
        return self._send_adapter(UPLOAD_ADAPTER, folder, fields, progress)

    def check_adapter(self, folder: Path, base: dict[str, str]) -> dict[str, Any]:
        """Have the service check an adapter's folder without storing it; return what it would store. `base` has the name of the base model
        (`base_model`) or the JSON of one that does not exist yet (`definition`). Raises InvalidRequest if a file is missing."""
        return self._send_adapter(CHECK_ADAPTER, folder, base)

    def _send_adapter(self, operation: Operation, folder: Path, fields: dict[str, str], progress: Progress | None = None) -> dict[str, Any]:
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
            address = self._address(operation, {})
            answer: dict[str, Any] = self._call(operation.method, address, data=fields | {"sha256": digest}, files=files)
        return answer


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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
