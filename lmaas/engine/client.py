"""The HTTP client of vLLM servers."""

import asyncio
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

#: Errors of a broken connection or a dead engine.
CONNECTION_ERRORS = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError, TimeoutError)

#: The time that an engine may take to end a response whose answer is complete.
READ_OUT_S = 1.0
#: The time that an engine may take to return its token counters.
COUNTERS_TIMEOUT_S = 5.0


class EngineError(Exception):
    """The engine responded with an error. `status` is the HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text[:500]}")
        self.status = status


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The tokens of a probe, which are in the engine's own counters too."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


async def _read_out(response: aiohttp.ClientResponse) -> None:
    try:
        async with asyncio.timeout(READ_OUT_S):
            await response.content.read()
    except CONNECTION_ERRORS:
        pass  # the answer was complete without it
    finally:
        response.release()


class EngineClient:
    """One HTTP client for all engines. Use as a context manager."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._ending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "EngineClient":
        # vLLM closes idle connections after 5 s. A shorter timeout ensures that no request uses a connection that is being closed.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)
        # No total limit, because a stream may be long. A dead engine is detected by its broken connection or by its supervisor.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("accept-encoding", "user-agent"),
            auto_decompress=False,
            read_bufsize=2**16,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """The open session. Raises RuntimeError outside the `async with`."""
        if self._session is None:
            raise RuntimeError("the client is not open")
        return self._session

    async def post(self, url: str, path: str, body: bytes, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        """Send a request and return its response while it arrives. The caller must `let_go` of it. Raises one of CONNECTION_ERRORS if the
        connection to the engine fails."""
        sent = {"content-type": "application/json", **headers}
        return await self.session.post(url + path, data=body, headers=sent)

    def let_go(self, response: aiohttp.ClientResponse, *, complete: bool) -> None:
        """Release a response. If its answer is `complete`, its last bytes are read in the background, so that the connection can be reused.
        Otherwise the connection is closed."""
        if not complete or response.content.at_eof():
            response.release()
            return
        task = asyncio.create_task(_read_out(response), name="read-out")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _ask(self, method: str, url: str, body: object = None, timeout_s: float = 30.0) -> bytes:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=5)
        async with self.session.request(method, url, json=body, timeout=timeout) as response:
            text = await response.read()
            if response.status >= 400:
                raise EngineError(response.status, text.decode(errors="replace"))
            return text

    async def healthy(self, url: str) -> bool:
        """Return whether the server responds. It may still be unable to do its work."""
        try:
            await self._ask("GET", f"{url}/health", timeout_s=5)
        except (EngineError, *CONNECTION_ERRORS):
            return False
        return True

    async def generate_token(self, url: str, model: str, request_id: str, timeout_s: float) -> ProbeResult:
        """Make the engine generate one token, which is the only proof that it can. Raises EngineError or one of CONNECTION_ERRORS."""
        body = {"model": model, "prompt": [1], "max_tokens": 1, "temperature": 0, "cache_salt": "probe"}
        usage: dict[str, Any] = (await self._post_probe(f"{url}/v1/completions", body, request_id, timeout_s))["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return ProbeResult(request_id, usage["prompt_tokens"], cached, usage["completion_tokens"])

    async def embed_token(self, url: str, model: str, request_id: str, timeout_s: float) -> ProbeResult:
        """Make the engine embed one token. Raises EngineError, also for a vector with NaN or infinity, or one of CONNECTION_ERRORS."""
        answer = await self._post_probe(f"{url}/v1/embeddings", {"model": model, "input": [[1]]}, request_id, timeout_s)
        [vector] = [each["embedding"] for each in answer["data"]]
        if not vector or not all(math.isfinite(number) for number in vector):
            raise EngineError(200, "the vector is empty or has numbers that are not finite")
        return ProbeResult(request_id, answer["usage"]["prompt_tokens"], 0, 0)

    async def _post_probe(self, url: str, body: dict[str, Any], request_id: str, timeout_s: float) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=5)
        async with self.session.post(url, json=body, timeout=timeout, headers={"x-request-id": request_id}) as response:
            text = await response.read()
            if response.status >= 400:
                raise EngineError(response.status, text.decode(errors="replace"))
        answer: dict[str, Any] = json.loads(text)
        return answer

    async def abort(self, url: str, engine_ids: list[str]) -> None:
        """Abort requests. Their responses then end with the usage so far."""
        await self._ask("POST", f"{url}/inference/v1/abort_requests", {"request_ids": engine_ids}, timeout_s=1)

    async def load_adapter(self, url: str, name: str, path: str) -> None:
        """Load an adapter's folder under an engine-wide name. Loading it again is not an error."""
        try:
            await self._ask("POST", f"{url}/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, timeout_s=120)
        except EngineError as error:
            if "already been loaded" not in str(error):
                raise

    async def unload_adapter(self, url: str, name: str) -> None:
        """Unload an adapter. An adapter that is not loaded is not an error."""
        try:
            await self._ask("POST", f"{url}/v1/unload_lora_adapter", {"lora_name": name}, timeout_s=30)
        except EngineError as error:
            if error.status != 404:
                raise

    async def counted_tokens(self, url: str) -> float:
        """Return the sum of the engine's counters of prompt and generated tokens, which grows while it works. An engine that embeds counts
        the prompts."""
        text = (await self._ask("GET", f"{url}/metrics", timeout_s=COUNTERS_TIMEOUT_S)).decode()
        wanted = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(wanted))
