"""The path of a request, from its key to its last token, as one readable function."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lmaas.admission.estimate import estimate
from lmaas.admission.limits import PrincipalLimits, limited_scopes, rate_limit_lines
from lmaas.admission.months import Months
from lmaas.admission.tiers import SERVICE_TIERS, tier
from lmaas.config import Settings
from lmaas.engine.client import EngineClient
from lmaas.errors import EngineFailed, Forbidden, InternalError, LmaasError, Unavailable
from lmaas.http import log_settings_error, parse_json
from lmaas.inference.catalog import Catalog, ServedModel
from lmaas.inference.checking import Check, check_grammar
from lmaas.inference.delivery import Delivery, Endpoint
from lmaas.inference.engine_errors import EngineLost
from lmaas.inference.grammars import Grammars, unavailable
from lmaas.inference.wait_reasons import COMMENT_EVERY_S, FIRST_COMMENT_S, WaitReasons, comments
from lmaas.metering.usage import UsageRecord
from lmaas.observability import GatewayMetrics
from lmaas.protocols import sse
from lmaas.protocols.parameters.request import EngineRequest
from lmaas.scheduling.client import Bounds, Ticket
from lmaas.scheduling.leases import Lease, Leases, OpenTicket
from lmaas.states import UsageStatus
from lmaas.types import Principal
from lmaas.web.auth import Authenticator
from lmaas.web.call import STREAM_HEADERS, Call
from lmaas.web.idempotency import Idempotency

log = logging.getLogger(__name__)

#: A request that has run for less time did not cause its engine to stall, because detecting a stall takes longer.
SUSPECT_S = 8.0


@dataclass(frozen=True, slots=True)
class Gateway:
    """The services that the request path uses, built in the composition root."""

    settings: Settings
    months: Months
    authenticate: Authenticator
    catalog: Catalog
    leases: Leases
    idempotency: Idempotency
    grammars: Grammars
    client: EngineClient
    metrics: GatewayMetrics
    wait_reasons: WaitReasons


async def complete(gateway: Gateway, call: Call, endpoint: Endpoint, read: Callable[[dict[str, Any]], EngineRequest]) -> None:
    """Serve one chat completion or completion, plain or streaming."""
    principal = await gateway.authenticate(call.api_key)
    if principal.tenant_id is None:
        raise Forbidden("An operator's key cannot call models. Use a tenant's key.")
    body = await call.body(gateway.settings.max_body_bytes)
    request = read(parse_json(body, texts=("messages", "prompt")))
    claim = gateway.idempotency.wanted(call, principal.tenant_id, endpoint.path, body)
    del body  # is not held while the request waits
    if claim is None:
        await _serve(gateway, call, endpoint, principal, request)
        return
    async with gateway.idempotency.claimed(call, claim) as is_first:
        if is_first:
            await _serve(gateway, call, endpoint, principal, request)


async def _serve(gateway: Gateway, call: Call, endpoint: Endpoint, principal: Principal, request: EngineRequest) -> None:
    """Resolve the model, take a lease, and deliver."""
    model = await gateway.catalog.resolve(principal.tenant_id or "", request.model)
    request.check_context(model.base.max_model_len)
    call.watch()
    check = Check.PASSED
    if request.must_be_checked:
        check = await _check(gateway, call, endpoint, principal, request, model)
        if check is Check.CLIENT_GONE:
            return
    record = _record(call, principal, request, model)
    ticket = _ticket(gateway, principal, request, model, record)
    limits = PrincipalLimits(gateway.months, principal, Bounds(principal.max_queued, gateway.settings.pool_max_queued))
    deadline_s = gateway.settings.queue_deadline_s
    async with gateway.leases.open(ticket, record, limits, deadline_s=deadline_s) as opened:
        if opened.left:
            call.add_to_head(rate_limit_lines(opened.left))
        with gateway.metrics.in_flight.track_inprogress():
            try:
                await _run(gateway, call, endpoint, principal, request, model, record, opened, check)
            except LmaasError as error:
                # Past its deadline a request has expired; everything else that ends here has failed.
                expired = isinstance(error, Unavailable) and error.error_code == Unavailable.code
                record.end(UsageStatus.EXPIRED if expired else UsageStatus.FAILED, error.error_code)
                await _answer_error(gateway, call, endpoint, error)
            except asyncio.CancelledError:
                # The gateway stops and its drain time is over. The client gets an error instead of a silent end.
                record.end(UsageStatus.FAILED, "gateway_stopped")
                stopping = Unavailable("The gateway is stopping. Retry after 1 s.", code="gateway_stopped", retry_after_s=1)
                await _answer_error(gateway, call, endpoint, stopping)
                raise
            except Exception:
                # The request was accepted, so it gets its response and its one usage event here. The log has the details.
                log.exception("unexpected error", extra={"request_id": call.request_id, "tenant_id": principal.tenant_id})
                record.end(UsageStatus.FAILED, "internal_error")
                await _answer_error(gateway, call, endpoint, InternalError())
            finally:
                _observe(gateway, endpoint, record)


async def _check(
    gateway: Gateway, call: Call, endpoint: Endpoint, principal: Principal, request: EngineRequest, model: ServedModel
) -> Check:
    deadline_s = gateway.settings.queue_deadline_s
    return await check_grammar(gateway.grammars, call, principal, model.base, endpoint.path, request, deadline_s)


async def _run(
    gateway: Gateway,
    call: Call,
    endpoint: Endpoint,
    principal: Principal,
    request: EngineRequest,
    model: ServedModel,
    record: UsageRecord,
    opened: OpenTicket,
    check: Check,
) -> None:
    """Wait for a lease and deliver; once more if an engine is lost before the client has had anything."""
    delivery = Delivery(call, endpoint, request, model, record, gateway.client)
    call.on_gone(opened.wake)
    while True:
        lease = await _leased(call, opened, gateway.wait_reasons, streaming=request.stream)
        if lease is None:
            return  # the client went away while it waited
        if check is Check.NO_HOST:
            # On a Ray cluster without replicas, no checker was available earlier. The new replica's host has one.
            check = await _check(gateway, call, endpoint, principal, request, model)
            if check is Check.CLIENT_GONE:
                return
            if check is Check.NO_HOST:
                raise unavailable()
        record.start(lease.replica, lease.queue_ms, lease.load_ms)
        began = time.monotonic()
        try:
            rest = await delivery.attempt(lease, opened, request.body(model.engine_name, cache_salt=opened.ticket.tenant))
            break
        except EngineLost as lost:
            if call.gone.is_set():
                return
            log.warning("a delivery failed", extra={"request_id": call.request_id, "replica_id": lease.replica, "detail": str(lost)})
            if delivery.begun:
                raise EngineFailed(
                    "The engine failed after it had sent a part of the answer, which is charged. Send the request again for a whole answer."
                ) from lost
            # The client has received nothing of this attempt.
            record.count({})
            if lost.revoked and request.constrained and time.monotonic() - began > SUSPECT_S:
                # The engine may have stalled on the request's grammar, so the request is not sent to another engine.
                raise EngineFailed("The engine stalled on this request. Simplify its schema or its tools before you retry.") from lost
            await opened.retry(lease, lost.reason)
    if call.gone.is_set() and record.completion_tokens == 0:
        # The request was cut before its first token. The engine reports the prompt's tokens, but has not finished or counted them.
        record.count({})
    if not call.gone.is_set():
        record.end(UsageStatus.COMPLETED)
        # The engine is done, so the slot is free for the next request while the client reads the rest.
        gateway.leases.settle(opened)
        await call.finish(rest)


async def _leased(call: Call, opened: OpenTicket, wait_reasons: WaitReasons, *, streaming: bool) -> Lease | None:
    """Wait for a lease and return it; None if the client has gone. Meanwhile a streaming client gets comments about its wait."""
    pause_s = FIRST_COMMENT_S
    while not call.gone.is_set():
        try:
            lease = await opened.wait(pause_s)
        except Unavailable as late:
            raise await wait_reasons.explained(late, opened.ticket.pool) from None
        if lease is not None:
            return None if call.gone.is_set() else lease
        pause_s = COMMENT_EVERY_S
        if streaming and not call.gone.is_set():
            reason = await wait_reasons.why(opened.ticket.pool)
            await call.start(200, STREAM_HEADERS)
            await call.write(b"".join(map(sse.comment, comments(opened.standing, reason, time.monotonic()))))
    return None


async def _answer_error(gateway: Gateway, call: Call, endpoint: Endpoint, error: LmaasError) -> None:
    """Send an error response, or an error event if the response has begun."""
    gateway.metrics.refused(endpoint.path, error.kind, error.error_code)
    log_settings_error(error, call.request_id, endpoint.path)
    if call.started:
        await call.finish(sse.data(error.body()))
        return
    text = sse.data(error.body())[len(b"data: ") :].strip()
    await call.start(int(error.status), {"content-type": "application/json", "content-length": str(len(text)), **error.headers()})
    await call.finish(text)


def _record(call: Call, principal: Principal, request: EngineRequest, model: ServedModel) -> UsageRecord:
    percent = SERVICE_TIERS[request.service_tier].price_percent
    return UsageRecord(
        request_id=call.request_id,
        tenant_id=principal.tenant_id,
        key_id=principal.key_id,
        base_model=model.base.name,
        model=request.model,
        adapter=model.adapter or None,
        adapter_version=model.version,
        stream=request.stream,
        # Rounded half up, so that half of the smallest price is not 0.
        prompt_price=(model.base.prompt_price * percent + 50) // 100,
        cached_price=(model.base.cached_price * percent + 50) // 100,
        completion_price=(model.base.completion_price * percent + 50) // 100,
    )


def _ticket(gateway: Gateway, principal: Principal, request: EngineRequest, model: ServedModel, record: UsageRecord) -> Ticket:
    service = SERVICE_TIERS[request.service_tier]
    prompt_tokens, completion_tokens = estimate(request.parameters, request.prompts, model.base.max_model_len)
    return Ticket(
        id=record.request_id,
        pool=model.base.id,
        tenant=principal.tenant_id or "",
        gateway=gateway.leases.gateway,
        adapter=model.adapter,
        source=model.source,
        weight=request.weight,
        event=record.event(),
        share=tier(principal.tier).share * service.share,
        head_start=service.head_start,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        prices=(record.prompt_price, record.cached_price, record.completion_price),
        limits=limited_scopes(principal),
    )


def _observe(gateway: Gateway, endpoint: Endpoint, record: UsageRecord) -> None:
    gateway.metrics.ended(
        endpoint.path,
        record.status,
        queue_s=record.queue_ms / 1000,
        prompt=record.prompt_tokens,
        cached=record.cached_tokens,
        completion=record.completion_tokens,
    )
