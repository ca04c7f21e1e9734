"""One attempt to send an event: a signed POST to the address that was checked, whose answer is not read."""

import asyncio
import socket
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import aiohttp

from lmaas.webhooks.signing import signed_headers
from lmaas.webhooks.targets import Resolve, TargetRefused, Targets

#: The time that an attempt may take, from the connection to the headers of the answer.
ATTEMPT_S = 15.0
#: Threads that look names up. Those of a tenant whose name server does not reply must not keep others waiting.
LOOKUPS = 32


@dataclass(frozen=True, slots=True)
class Sent:
    """The outcome of an attempt. `error` is None for a success, otherwise a sentence for the tenant."""

    status_code: int | None
    error: str | None
    duration_ms: int
    retry_after_s: float | None = None


class Sender:
    """The HTTP client of webhooks. Use as a context manager."""

    def __init__(self, targets: Targets, resolve: Resolve | None = None, attempt_s: float = ATTEMPT_S) -> None:
        self._targets, self._resolve, self._attempt_s = targets, resolve or self._look_up, attempt_s
        self._lookups: ThreadPoolExecutor | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Sender":
        self._lookups = ThreadPoolExecutor(LOOKUPS, "lookup")
        # A connection serves one attempt, because the next one checks the address anew. The certificates are those of the system, or of
        # SSL_CERT_FILE.
        connector = aiohttp.TCPConnector(limit=0, force_close=True, ssl=ssl.create_default_context())
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"user-agent": "lmaas-webhooks/1", "content-type": "application/json", "accept": "*/*"},
            skip_auto_headers=("accept-encoding",),
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._session is not None:
            await self._session.close()
        if self._lookups is not None:
            self._lookups.shutdown(wait=False, cancel_futures=True)

    async def _look_up(self, host: str, port: int) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._lookups, socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM)
        return [str(entry[4][0]) for entry in found]

    async def send(self, url: str, event_id: str, body: bytes, keys: Sequence[bytes]) -> Sent:
        """Send an event once. Any status from 200 to 299 is a success; redirects are not followed."""
        if self._session is None:
            raise RuntimeError("the sender is not open")
        began = time.monotonic()

        def took_ms() -> int:
            return round(1000 * (time.monotonic() - began))

        try:
            async with asyncio.timeout(self._attempt_s):
                status, retry_after = await self._post(self._session, url, event_id, body, keys)
        except TargetRefused as refused:
            return Sent(None, str(refused), took_ms())
        except TimeoutError:
            return Sent(None, f"The target did not answer within {self._attempt_s:g} s.", took_ms())
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Sent(None, _described(error), took_ms())
        return Sent(status, _refusal(status), took_ms(), _seconds(retry_after))

    async def _post(
        self, session: aiohttp.ClientSession, url: str, event_id: str, body: bytes, keys: Sequence[bytes]
    ) -> tuple[int, str | None]:
        pinned = await self._targets.pin(url, self._resolve)
        headers = signed_headers(event_id, int(time.time()), body, keys) | {"host": pinned.authority}
        response = await session.post(pinned.url, data=body, headers=headers, allow_redirects=False, server_hostname=pinned.host)
        # The rest of the answer, of whatever size, is not read.
        response.close()
        return response.status, response.headers.get("retry-after")


def _refusal(status: int) -> str | None:
    if 200 <= status < 300:
        return None
    if 300 <= status < 400:
        return f"The target redirects (HTTP {status}), and redirects are not followed. Change the URL of the webhook to the final one."
    return f"The target answered with HTTP {status}."


def _seconds(retry_after: str | None) -> float | None:
    """Return the seconds of a `Retry-After`. A date counts as none."""
    return (
        float(retry_after)
        if retry_after is not None and retry_after.isascii() and retry_after.isdigit() and len(retry_after) < 10
        else None
    )


def _described(error: Exception) -> str:
    """Return what went wrong, without addresses."""
    match error:
        case aiohttp.ClientConnectorCertificateError():
            reason = getattr(error.certificate_error, "verify_message", "") or "it cannot be verified"
            return f"The TLS certificate of the target is not valid: {reason}."
        case aiohttp.ClientConnectorSSLError() | aiohttp.ClientSSLError():
            return "A TLS connection to the target failed."
        case aiohttp.ClientConnectorError():
            return f"The target cannot be reached: {error.os_error.strerror or 'the connection failed'}."
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientOSError():
            return "The target closed the connection before it answered."
        case aiohttp.ClientResponseError():
            return "The target's answer is not valid HTTP."
        case _:
            return f"The attempt failed ({type(error).__name__})."
