"""A client of the management API for one person. Methods and paths come from the table of operations."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from lmaas.api.operation import Operation, filled
from lmaas.errors import ApiError

#: Time for one call. A page waits for its slowest call.
CALL_TIMEOUT = httpx.Timeout(20, connect=3)
#: Time for which an upload or a stream may be silent.
STREAM_TIMEOUT = httpx.Timeout(300, connect=3)
MAX_CONNECTIONS = 200
#: The code of an error that means that the service cannot be reached.
UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class Unread:
    """Data that could not be read. A page shows the message, with a link to try again (`ui.unreadable`)."""

    message: str
    #: The parameter that is wrong, if one is.
    param: str | None = None


class ApiConnections:
    """The connections of all sessions to the gateways. Use as a context manager."""

    def __init__(self, url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._root = url.removesuffix("/").removesuffix("/v1")
        limits = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=20)
        self.http = httpx.AsyncClient(base_url=self._root, timeout=CALL_TIMEOUT, limits=limits, transport=transport, trust_env=False)

    async def __aenter__(self) -> "ApiConnections":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    def with_key(self, key: str, tenant: str | None = None) -> "ApiClient":
        """Return a client that calls the API with this key; for an operator, about the resources of `tenant`."""
        return ApiClient(self.http, key, tenant)


class ApiClient:
    """Calls operations with the key of one session. The API checks every permission; the console has none of its own."""

    def __init__(self, http: httpx.AsyncClient, key: str, tenant: str | None = None) -> None:
        self._http, self._key, self.tenant = http, key, tenant

    def for_tenant(self, tenant: str) -> "ApiClient":
        """Return a client of the same operator for a tenant's resources."""
        return ApiClient(self._http, self._key, tenant)

    async def send(
        self,
        operation: Operation,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, Any] | None = None,
        files: Any = None,
        **path: str,
    ) -> dict[str, Any]:
        """Call an operation and return the JSON of its answer. `path` has the parameters of its path.

        Values of the query that are None or empty are not sent. With `files`, the body is a multipart form of `body` and these. Raises
        ApiError, also with the status 503 and the code `unreachable` if the service cannot be reached.
        """
        options: dict[str, Any] = {"params": _params(query)}
        if files is not None:
            options |= {"data": body, "files": files, "timeout": STREAM_TIMEOUT}
        elif body is not None:
            options["json"] = body
        try:
            response = await self._http.request(operation.method, self.address(operation, path), headers=self._headers, **options)
        except httpx.RequestError as error:
            raise unreachable() from error
        return read(response)

    async def read_all(self, **calls: Any) -> dict[str, Any]:
        """Await several calls at once and return their results by name. What could not be read is an Unread with the API's message.

        Raises ApiError if the session has ended (status 401).
        """
        results = await asyncio.gather(*calls.values(), return_exceptions=True)
        found: dict[str, Any] = {}
        for name, result in zip(calls, results, strict=True):
            if isinstance(result, ApiError) and result.status != 401:
                found[name] = Unread(result.message, result.param)
            elif isinstance(result, BaseException):
                raise result
            else:
                found[name] = result
        return found

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        address: str,
        *,
        json: Any = None,
        content: Any = None,
        query: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """Send a request whose answer is read as it comes: a stream of a model, or a file. `address` is a path such as
        `/v1/chat/completions`, or that of an operation (`address`).

        Raises ApiError for an error that comes before the answer, and httpx.RequestError while it is read.
        """
        sent = self._http.build_request(
            method,
            address,
            json=json,
            content=content,
            params=_params(query),
            headers={**self._headers, **(headers or {})},
            timeout=STREAM_TIMEOUT,
        )
        try:
            response = await self._http.send(sent, stream=True)
        except httpx.RequestError as error:
            raise unreachable() from error
        try:
            if response.is_error:
                await response.aread()
                read(response)
            yield response
        finally:
            await response.aclose()

    def address(self, operation: Operation, path: Mapping[str, str]) -> str:
        """Return the address of an operation: for an operator's client of a tenant, that of the tenant's resources."""
        owner = {} if self.tenant is None else {"tenant": self.tenant}
        named = owner | dict(path)
        of_tenant = operation.operator_path
        return filled(of_tenant if of_tenant is not None and "tenant" in named else operation.path, named)

    @property
    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self._key}"}


def _params(query: Mapping[str, Any] | None) -> dict[str, str]:
    shown = (
        (name, str(value).lower() if isinstance(value, bool) else str(value)) for name, value in (query or {}).items() if value is not None
    )
    return {name: value for name, value in shown if value != ""}


def read(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON of an answer. Raises ApiError for an error, and for what is not an answer of the service."""
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if response.is_success and isinstance(answer, dict):
        return answer
    said = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(said, dict) or not isinstance(said.get("message"), str):
        raise ApiError(502, f"The service sent an answer that cannot be read (status {response.status_code}). Try again.", "", "")
    request_id = response.headers.get("x-request-id", "")
    raise ApiError(response.status_code, said["message"], str(said.get("code") or ""), request_id, said.get("param"))


def unreachable() -> ApiError:
    """Return the error for a service that cannot be reached."""
    return ApiError(503, "The service cannot be reached. Try again in a few seconds.", UNREACHABLE, "")
