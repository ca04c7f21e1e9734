"""The composition root: builds the gateway, the controller, the job runner and the supervisor from settings, and hands state down."""

import asyncio
import contextlib
import functools
import gc
import logging
import resource
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from lmaas.adapters.objects import AdapterFiles
from lmaas.adapters.service import Adapters
from lmaas.admission.months import Months
from lmaas.admission.tiers import file_quota
from lmaas.api import openapi, staging
from lmaas.api.context import Api
from lmaas.api.routes import routes as api_routes
from lmaas.batches.work import BatchWork
from lmaas.config import Settings
from lmaas.control.controller import Controller
from lmaas.control.ending import END_GRACE_S, end_replicas
from lmaas.control.provisioners import Provisioner
from lmaas.control.provisioners.local import LocalProvisioner
from lmaas.control.status import serve_status
from lmaas.engine.client import EngineClient
from lmaas.engine.grammars.service import serve_checks
from lmaas.errors import LmaasError, SettingsError, SettingUp, Unavailable
from lmaas.files.service import Files
from lmaas.http import Frame, on_error, on_http_exception
from lmaas.inference.cache import Changes
from lmaas.inference.catalog import Catalog
from lmaas.inference.checker_hosts import CheckerHosts
from lmaas.inference.counting import Counting, PromptReaders, TokenCounts
from lmaas.inference.grammars import Grammars
from lmaas.inference.observers import UNOBSERVED, Observers, observing
from lmaas.inference.protocol import AnyProtocol
from lmaas.inference.serving import Inferences
from lmaas.inference.wait_reasons import WaitReasons
from lmaas.jobs.background import BackgroundRuns
from lmaas.jobs.batches import BatchWorker
from lmaas.jobs.keys import Keys
from lmaas.jobs.lines import LineWorker
from lmaas.jobs.metrics import JobMetrics
from lmaas.jobs.process import Jobs
from lmaas.jobs.runner import Runner, Worker
from lmaas.jobs.webhooks import WebhookWorker
from lmaas.observability import GatewayMetrics
from lmaas.protocols.messages.openapi import SCHEMAS as MESSAGES_SCHEMAS
from lmaas.protocols.messages.openapi import messages_paths
from lmaas.protocols.messages.protocol import Messages
from lmaas.protocols.models import SCHEMAS as MODELS_SCHEMAS
from lmaas.protocols.models import models_paths
from lmaas.protocols.openapi import SCHEMAS as OPENAI_SCHEMAS
from lmaas.protocols.openapi import openai_paths
from lmaas.protocols.pooling.embeddings import Embeddings
from lmaas.protocols.pooling.openapi import SCHEMAS as POOLING_SCHEMAS
from lmaas.protocols.pooling.openapi import pooling_paths
from lmaas.protocols.pooling.ranking import Rerank, Score
from lmaas.protocols.responses.background import BackgroundResponses
from lmaas.protocols.responses.event_log import EventLogs
from lmaas.protocols.responses.lines import LineResponses
from lmaas.protocols.responses.openapi import SCHEMAS as RESPONSES_SCHEMAS
from lmaas.protocols.responses.openapi import responses_paths
from lmaas.protocols.responses.protocol import Responses
from lmaas.protocols.responses.stored import StoredState
from lmaas.protocols.responses.writer import Writer
from lmaas.protocols.text import ChatCompletions, Completions
from lmaas.protocols.tokens.counts import CountTokens, InputTokens
from lmaas.protocols.tokens.openapi import SCHEMAS as TOKENS_SCHEMAS
from lmaas.protocols.tokens.openapi import tokens_paths
from lmaas.protocols.tokens.tokenize import Detokenize, Tokenize
from lmaas.reference.pages import Reference
from lmaas.replica.supervisor import Supervisor
from lmaas.scheduling.client import Scheduler, connect
from lmaas.scheduling.leases import Leases
from lmaas.states import TERMINAL, Observed
from lmaas.store.changes import change_number
from lmaas.store.database import Database, new_id
from lmaas.store.models import get_base_model
from lmaas.store.objects import Objects
from lmaas.store.replicas import get_replica
from lmaas.store.rights import DatabaseRole
from lmaas.web.auth import Authenticator
from lmaas.web.background import Background
from lmaas.web.console import ConsoleForwarding
from lmaas.web.cors import Cors
from lmaas.web.idempotency import Idempotency
from lmaas.web.routes import Gateway, endpoints
from lmaas.web.routes import routes as gateway_routes
from lmaas.web.server import server
from lmaas.webhooks.sending import Sender
from lmaas.webhooks.targets import Targets, networks

log = logging.getLogger(__name__)

#: The number of new objects between two runs of a gateway's garbage collector, and the number of runs between those for the older
#: generations.
COLLECT_EVERY = (10_000, 20, 20)


def object_store_url(settings: Settings) -> str:
    """Return the URL of the object store: that of the settings, or a folder of this stack."""
    return settings.object_store_url or (settings.home / "objects").as_uri()


@dataclass(frozen=True, slots=True)
class Services:
    """The services that every process uses: Postgres, Redis and the object store."""

    db: Database
    redis: Redis
    scheduler: Scheduler
    objects: Objects
    adapter_files: AdapterFiles

    def files(self, settings: Settings) -> Files:
        """Return the service of tenants' files."""
        return Files(self.db, self.objects, settings.uploads, settings.max_file_bytes, file_quota)


@asynccontextmanager
async def connected(settings: Settings, role: DatabaseRole | None, *, connections: int = 5) -> AsyncIterator[Services]:
    """Connect a process with this database role to the services of `settings`, and close them at the end.

    Raises SettingsError if an address is missing.
    """
    if settings.database_url is None or settings.redis_url is None:
        raise SettingsError("Set LMAAS_DATABASE_URL and LMAAS_REDIS_URL, or use `lmaas up`, which starts both servers.")
    db = Database(settings.database_url, role, prefix=settings.database_role_prefix, connections=connections)
    redis = connect(settings.redis_url)
    try:
        objects = Objects(object_store_url(settings))
        yield Services(db, redis, Scheduler(redis), objects, AdapterFiles(objects))
    finally:
        await redis.aclose()
        await db.close()


def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI document of the whole HTTP surface."""
    common = openapi.headers(), openapi.error_response
    return openapi.document(
        openai_paths(*common)
        | pooling_paths(*common)
        | messages_paths(*common)
        | responses_paths(*common)
        | tokens_paths(*common)
        | models_paths(*common),
        OPENAI_SCHEMAS | POOLING_SCHEMAS | MESSAGES_SCHEMAS | RESPONSES_SCHEMAS | TOKENS_SCHEMAS | MODELS_SCHEMAS,
    )


def build_inferences(settings: Settings, services: Services, changes: Changes, metrics: GatewayMetrics) -> Inferences:
    """Build the path of requests. Its `client` must be open, and its `leases` and the `changes` must run, while it serves."""
    db, client = services.db, EngineClient()
    leases = Leases(services.scheduler, new_id("gw"))
    grammars = Grammars(CheckerHosts(services.redis, client), metrics)
    return Inferences(settings, Months(db), Catalog(db, changes), leases, grammars, client, metrics, WaitReasons(db))


def webhook_targets(settings: Settings) -> Targets:
    """Return the rules for the targets of webhooks."""
    return Targets(networks(settings.webhook_private_targets))


def batch_protocols(responses: Responses) -> list[AnyProtocol]:
    """Return the protocols whose requests batches may contain. `responses` keeps the state of responses."""
    return [ChatCompletions(), Completions(), Embeddings(), Messages(), responses]


def build_gateway(settings: Settings, services: Services, observers: Observers = UNOBSERVED) -> tuple[ASGIApp, Leases]:
    """Build the gateway's ASGI application, and its leases, which a shutdown waits for."""
    db = services.db
    changes = Changes(functools.partial(change_number, db))
    authenticate = Authenticator(db, settings.auth_grace_s, changes)
    metrics = GatewayMetrics(observers.dropped, by_tenant=settings.metrics_by_tenant)
    idempotency = Idempotency(db, metrics, settings.max_kept_answer_bytes)
    inferences = build_inferences(settings, services, changes, metrics)
    leases = inferences.leases
    kept_for = timedelta(seconds=settings.response_retention_s)
    writer = Writer(db, metrics, kept_for, _end_process_on_failure)
    state = StoredState(db, writer)
    responses = Responses(state)
    protocols: list[AnyProtocol] = [*batch_protocols(responses), Rerank(), Score()]
    countings: list[Counting] = [Tokenize(), Detokenize(), CountTokens(), InputTokens(responses)]
    counts = TokenCounts(inferences.catalog, inferences.grammars, PromptReaders(inferences.grammars.hosts))
    logs = EventLogs(db)
    deadline = timedelta(seconds=settings.background_deadline_s)
    console = ConsoleForwarding(settings.console_url)
    background = Background(db, inferences, idempotency, logs, metrics, deadline, kept_for)
    gateway = Gateway(settings, authenticate, idempotency, inferences, background, metrics, protocols, counts, countings, observers.traces)
    api = Api(settings, db, authenticate, Adapters(db, services.adapter_files), services.files(settings), state, logs)

    async def ready() -> None:
        await db.check()
        try:
            await services.redis.ping()
        except RedisError as error:
            raise Unavailable("The request queue is not available. Retry after 2 s.", code="queue_unavailable", retry_after_s=2) from error
        if settings.ready_file is not None and not settings.ready_file.exists():
            raise SettingUp

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await asyncio.to_thread(staging.sweep, settings.uploads)
        async with inferences.client, console:
            keepers = [
                asyncio.create_task(coroutine, name=name)
                for name, coroutine in {
                    "leases": leases.run(),
                    "idempotency": idempotency.run(),
                    "changes": changes.run(),
                    "event-logs": logs.run(),
                }.items()
            ]
            for keeper in keepers:
                # A task that ends unexpectedly must end the process. Otherwise nothing would be granted, and running claims would look
                # abandoned.
                keeper.add_done_callback(_end_process_on_failure)
            try:
                yield
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(settings.drain_timeout_s):
                        await leases.drained()
                        await idempotency.drained()
                        await writer.drained()
            finally:
                await writer.close()
                for keeper in keepers:
                    keeper.cancel()
                # The keepers return their connections before the connection pool is closed.
                await asyncio.gather(*keepers, return_exceptions=True)

    app = Starlette(
        routes=[*gateway_routes(gateway, ready), *_described_routes(api), *console.routes()],
        lifespan=lifespan,
        exception_handlers={HTTPException: on_http_exception, LmaasError: on_error, Exception: on_error},
    )
    # The frame removes slashes at the end. A redirect would name this server's own address, which differs from the client's behind a proxy.
    app.router.redirect_slashes = False
    frame = Frame(app, endpoints(gateway), observers.ended)
    origins = settings.cors_origin_list
    return Cors(frame, origins) if origins else frame, leases


def _described_routes(api: Api) -> list[BaseRoute]:
    """Return the routes of the management API and of what describes the whole API: the OpenAPI document and the pages below /docs."""
    spec = openapi_document()
    return [*api_routes(api, spec), *Reference(spec).routes()]


def _end_process_on_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("a part of the gateway failed", exc_info=task.exception())
        raise SystemExit(1)


async def run_gateway(settings: Settings) -> None:
    """Run a gateway until it is stopped."""
    with observing(settings, "gateway") as observers:
        async with connected(settings, DatabaseRole.GATEWAY) as services:
            app, _ = build_gateway(settings, services, observers)
            _raise_file_limit()
            _calm_collector()
            await server(app, settings, observers.ended).serve()


def _calm_collector() -> None:
    """Exempt the objects that exist now from garbage collection, which took a fifth of the gateway's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_EVERY)


def _raise_file_limit() -> None:
    """Raise the limit of open files, which is 1,024 on many systems, to the maximum for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def provisioner(settings: Settings) -> Provisioner:
    """Build the provisioner of the settings."""
    if settings.provisioner == "local":
        return LocalProvisioner(for_replicas(settings))
    try:
        from lmaas.control.provisioners.ray import RayProvisioner  # noqa: PLC0415 (Ray is an extra, and takes a second to import)
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise SettingsError("LMAAS_PROVISIONER=ray needs Ray. Install it with: pip install 'lmaas[ray]'") from None
    # On the nodes, the home is a different folder.
    return RayProvisioner(replace(for_replicas(settings), object_store_url=object_store_url(settings)))


def for_replicas(settings: Settings) -> Settings:
    """Return the settings of replicas' supervisors: with a login of their own if there is one, and without the console's secrets."""
    url = settings.replica_database_url or settings.database_url
    settings = replace(settings, console_key=None, console_oidc_client_secret=None)
    return replace(settings, database_url=url, replica_database_url=None, database_passwords="")


async def run_controller(settings: Settings) -> None:
    """Run a controller until it is stopped. Replicas continue, unless the settings end them with it."""
    told_to_stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_stop.set)
    async with connected(settings, DatabaseRole.CONTROLLER) as services:
        where = provisioner(settings)
        controller = Controller(settings, services.db, services.scheduler, where, files=services.files(settings))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(controller.run(), name="controller")]
            if settings.provisioner == "local":
                # Engines run on this host. With another provisioner, the replicas' hosts check.
                tasks.append(group.create_task(serve_checks(settings, services.db, services.redis), name="grammar-checker"))
            if settings.controller_port is not None:
                tasks.append(group.create_task(serve_status(settings, controller, services.db), name="status"))
            await told_to_stop.wait()
            for task in tasks:
                task.cancel()
        # Also if this controller is not active, because it may have just lost the lead, and replicas on this machine end with it in any
        # case.
        if settings.controller_ends_replicas:
            await end_replicas(services.db, where, settings.drain_timeout_s + END_GRACE_S)


def build_jobs(settings: Settings, services: Services, observers: Observers = UNOBSERVED) -> Jobs:
    """Build a job runner."""
    db = services.db
    changes = Changes(functools.partial(change_number, db))
    requests, metrics = GatewayMetrics(observers.dropped, by_tenant=settings.metrics_by_tenant), JobMetrics()
    requests.registry.register(metrics)
    inferences = build_inferences(settings, services, changes, requests)
    state, kept_for = StoredState(db), timedelta(seconds=settings.response_retention_s)
    protocols = {protocol.path: protocol for protocol in batch_protocols(LineResponses(state, kept_for))}
    files, keys = services.files(settings), Keys(db, settings.auth_grace_s, changes)
    work = BatchWork(db, files, inferences.catalog, protocols, settings.max_body_bytes)
    workers: list[Worker] = [
        BatchWorker(db, work, metrics),
        LineWorker(db, files, services.scheduler, inferences, protocols, keys, metrics, settings.drain_timeout_s, observers),
        BackgroundRuns(db, inferences, BackgroundResponses(state), keys, metrics, kept_for, observers),
        WebhookWorker(db, Sender(webhook_targets(settings)), metrics, timedelta(seconds=settings.webhook_off_after_s)),
    ]
    return Jobs(settings, Runner(db, workers, metrics.lost), inferences, changes, requests)


async def run_jobs(settings: Settings) -> None:
    """Run a job runner until it is stopped."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    # As many connections as it usually needs at a time: opening one for a single transaction costs Postgres more than the transaction.
    with observing(settings, "jobs") as observers:
        async with connected(settings, DatabaseRole.JOBS, connections=10) as services:
            _raise_file_limit()
            await build_jobs(settings, services, observers).run(stopping)


async def run_replica(settings: Settings, replica_id: str) -> bool:
    """Supervise one replica for its whole life. Returns False if it failed."""
    async with connected(settings, DatabaseRole.REPLICA, connections=1) as services, EngineClient() as client:
        row = await get_replica(services.db, replica_id)
        if row is None or row.observed in TERMINAL:
            raise SettingsError(f"The replica {replica_id} does not exist, or has ended.")
        model = await get_base_model(services.db, row.base_model_id)
        supervisor = Supervisor(settings, services.db, services.scheduler, services.adapter_files, client, model, replica_id)
        # With a local provisioner, the controller checks.
        checking = serve_checks(settings, services.db, services.redis, model.id) if settings.provisioner != "local" else None
        checks = asyncio.create_task(checking, name="grammar-checker") if checking is not None else None
        try:
            ending = await supervisor.run()
        finally:
            if checks is not None:
                checks.cancel()
                await asyncio.gather(checks, return_exceptions=True)
        return ending.state is Observed.STOPPED
