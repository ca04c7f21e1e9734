"""A client of the management API, for the CLI and for manifests. Methods and paths come from the table of operations."""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, get_args, get_origin
from urllib.parse import urlsplit

import httpx
from msgspec import Struct
from msgspec.structs import fields as fields_of

from lmaas.adapters.config import CONFIG_FILE
from lmaas.adapters.safetensors import MODEL_FILE
from lmaas.api.operation import Operation, filled
from lmaas.api.shapes.common import MAX_PAGE
from lmaas.api.shapes.files import ANCHOR, SECONDS
from lmaas.api.table import CHECK_ADAPTER, CREATE_FILE, UPLOAD_ADAPTER
from lmaas.errors import ApiError, InvalidRequest, SettingsError

Progress = Callable[[int], None]


class ApiClient:
    """Calls the service at `base_url` (which ends in `/v1`) with one key. An operator names the `tenant` whose resources are meant."""

    def __init__(self, base_url: str, key: str, tenant: str | None = None) -> None:
        self._root = base_url.strip().removesuffix("/").removesuffix("/v1")
        key = key.strip()
        if not is_sendable(key):
            raise SettingsError("The API key has a space or a character that no key has. Copy it again, for instance to LMAAS_API_KEY.")
        # A proxy that the environment names does not lead to this machine.
        local = _host(self._root) in ("127.0.0.1", "localhost", "::1")
        timeout = httpx.Timeout(60, write=600)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(headers=headers, timeout=timeout, trust_env=not local)
        self.tenant = tenant

    def for_tenant(self, tenant: str) -> "ApiClient":
        """Return a client of the same operator for a tenant's resources."""
        client = ApiClient(self._root, "", tenant)
        client._http = self._http
        return client

    def with_key(self, key: str) -> "ApiClient":
        """Return a client of the same service with another key."""
        return ApiClient(self._root, key)

    def works(self) -> bool:
        """Return whether the key is valid. Raises ApiError for any other error, and SettingsError if the service cannot be reached."""
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

    def set_timeout(self, seconds: float) -> None:
        """Wait only for so long from now on."""
        self._http.timeout = httpx.Timeout(seconds)

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
        Values of the query that are None are not sent. Raises ApiError, also for an answer that is not the operation's, SettingsError if
        the service cannot be reached, and InvalidRequest for what cannot be sent.
        """
        params = {name: _text(value) for name, value in (query or {}).items() if value is not None}
        return self._checked(operation, path, params=params, json=body)

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

    @contextmanager
    def streamed(self, path: str, body: Mapping[str, Any]) -> Iterator[Iterator[str]]:
        """Send a request of a client protocol, and provide the lines of its answer as they arrive. Leaving the block ends the request.

        Raises as `send`.
        """
        with self._errors(), self._http.stream("POST", self._root + path, json=body) as response:
            if response.is_error:
                response.read()
                self._read(response, None)
            yield response.iter_lines()

    def _address(self, operation: Operation, path: Mapping[str, str]) -> str:
        owner = {} if self.tenant is None else {"tenant": self.tenant}
        named = owner | dict(path)
        of_tenant = operation.operator_path
        return filled(of_tenant if of_tenant is not None and "tenant" in named else operation.path, named)

    def _checked(self, operation: Operation, path: Mapping[str, str], **options: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._call(operation.method, self._address(operation, path), operation.answer, **options)
        return answer

    def _call(self, method: str, path: str, kind: type[Struct] | None = None, **options: Any) -> Any:
        """Return the JSON of an answer, which has the fields of `kind`. The messages of errors never have the key."""
        with self._errors():
            response = self._http.request(method, self._root + path, **options)
        return self._read(response, kind)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise SettingsError if the service cannot be reached in the block, and InvalidRequest for what cannot be sent."""
        try:
            yield
        except UnicodeError:
            raise InvalidRequest("A value has characters that are not valid text (UTF-8), so it cannot be sent.") from None
        except ValueError as error:
            raise InvalidRequest(f"This cannot be sent: {error}") from error
        except httpx.InvalidURL as error:
            raise SettingsError(f"The address {self.address} is not valid: {error}. Correct LMAAS_URL.") from error
        except httpx.LocalProtocolError:
            # Its text has the headers, and so the key.
            raise SettingsError("The request has a header that cannot be sent. Check LMAAS_API_KEY and LMAAS_URL.") from None
        except httpx.TransportError as error:
            raise SettingsError(
                f"The service at {self.address} cannot be reached ({error}). Start it with `lmaas up`, or set LMAAS_URL and LMAAS_API_KEY."
            ) from error
        except httpx.RequestError as error:
            raise SettingsError(f"The answer of the service at {self.address} cannot be read ({error}). Check LMAAS_URL.") from error

    def _read(self, response: httpx.Response, kind: type[Struct] | None) -> Any:
        """Return the JSON of an answer. Raises ApiError for an error, and for what is not an answer of the service."""
        try:
            answer = response.json()
        except ValueError:
            raise self._foreign(response.status_code) from None
        if response.is_success:
            if kind is not None and not _fits(answer, kind):
                raise self._foreign(response.status_code)
            return answer
        said = answer.get("error") if isinstance(answer, dict) else None
        if not isinstance(said, dict) or not isinstance(said.get("message"), str):
            raise self._foreign(response.status_code)
        request_id = response.headers.get("x-request-id", "")
        raise ApiError(response.status_code, said["message"], str(said.get("code") or ""), request_id, said.get("param"))

    @property
    def address(self) -> str:
        """The address of the service without a path, a user and a password."""
        scheme, separator, rest = self._root.rpartition("://")
        host, slash, path = rest.partition("/")
        return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"

    def _foreign(self, status: int) -> ApiError:
        message = f"The service at {self.address} answered with something that is not lmaas (status {status}). Check LMAAS_URL."
        return ApiError(status, message, "", "")

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
            with _reading(needed):
                if not needed.is_file():
                    raise InvalidRequest(
                        f"There is no {needed}. Save the adapter with PEFT's save_pretrained(..., safe_serialization=True)."
                    )
        with _reading(config):
            settings = config.read_bytes()
        with _reading(model):
            file = model.open("rb")
        with file:
            with _reading(model):
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                file.seek(0)
            files = {
                "adapter_config": (CONFIG_FILE, settings, "application/json"),
                "adapter_model": (MODEL_FILE, _Counted(model, file, progress or (lambda _: None)), "application/octet-stream"),
            }
            return self._checked(operation, {}, data=fields | {"sha256": digest}, files=files)

    def upload_file(
        self, path: Path, purpose: str, *, expires_after_s: int | None = None, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Upload a file of the client's tenant, and return the service's description of it. Raises as `send`."""
        fields = {"purpose": purpose}
        if expires_after_s is not None:
            fields |= {ANCHOR: "created_at", SECONDS: str(expires_after_s)}
        with _reading(path):
            file = path.open("rb")
        with file:
            files = {"file": (path.name, _Counted(path, file, progress or (lambda _: None)), "application/octet-stream")}
            return self._checked(CREATE_FILE, {}, data=fields, files=files)

    def download(
        self,
        operation: Operation,
        target: BinaryIO,
        progress: Progress | None = None,
        *,
        query: Mapping[str, Any] | None = None,
        **path: str,
    ) -> None:
        """Write the answer of an operation to a file, as it comes. Raises as `send`, and SettingsError if the answer breaks off."""
        params = {name: _text(value) for name, value in (query or {}).items() if value is not None}
        with self._errors(), self._http.stream(operation.method, self._root + self._address(operation, path), params=params) as response:
            if response.is_error:
                response.read()
                self._read(response, None)
            for chunk in response.iter_bytes():
                target.write(chunk)
                if progress is not None:
                    progress(len(chunk))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise InvalidRequest, which names the file, if it cannot be read."""
    try:
        yield
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror or error}.") from error


def is_sendable(key: str) -> bool:
    """Return whether a key has only characters that a header may have."""
    return key.isascii() and key.isprintable() and " " not in key


def _host(url: str) -> str:
    """Return the host of an address. Raises SettingsError if it is not an address."""
    try:
        parts = urlsplit(url)
        # Reading the port checks it.
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts.hostname
    except ValueError:
        pass
    raise SettingsError("LMAAS_URL is not the address of a service, such as http://127.0.0.1:8080/v1.")


def _fits(value: Any, kind: Any) -> bool:
    """Return whether JSON has the fields of an answer's type, and its lists are lists of such. Further fields may be a newer release's."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    struct = get_origin(kind) or kind
    if not isinstance(struct, type) or not issubclass(struct, Struct):
        return True
    return isinstance(value, dict) and all(
        _fits(value[field.encode_name], field.type) if field.encode_name in value else not field.required for field in fields_of(kind)
    )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Counted(io.RawIOBase):
    """A file that reports how much of it has been read."""

    def __init__(self, path: Path, file: BinaryIO, progress: Progress) -> None:
        self._path, self._file, self._progress = path, file, progress

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes. Raises InvalidRequest if the disk fails."""
        with _reading(self._path):
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
