"""The path of a request, from its acceptance to its usage event, as one readable class. It knows neither HTTP nor a client's protocol."""

import asyncio
import json
import logging
import time
from dataclasses import dataclass

from lmaas.admission.limits import PrincipalLimits, limited_scopes
from lmaas.admission.months import Months
from lmaas.admission.tiers import SERVICE_TIERS, ServiceTier, tier
from lmaas.config import Settings
from lmaas.engine.client import EngineClient
from lmaas.errors import EngineFailed, InternalError, LmaasError, Unavailable
from lmaas.http import log_settings_error
from lmaas.inference.catalog import Catalog
from lmaas.inference.checker_hosts import NoCheckerError
from lmaas.inference.checking import check_grammar
from lmaas.inference.delivery import Delivery
from lmaas.inference.engine_errors import EngineLost
from lmaas.inference.grammars import Grammars, unavailable
from lmaas.inference.protocol import AnyInference
from lmaas.inference.request_traces import operation
from lmaas.inference.sink import STREAM_HEADERS, ReceiverGone, Sink
from lmaas.inference.wait_reasons import COMMENT_EVERY_S, FIRST_COMMENT_S, WaitReasons, comments
from lmaas.inference.work import PutBack
from lmaas.metering.usage import PUT_BACK, STOPPED, UsageRecord
from lmaas.observability import GatewayMetrics
from lmaas.scheduling.client import Bounds, Ticket
from lmaas.scheduling.leases import Lease, Leases, OpenTicket
from lmaas.states import UsageStatus, WorkClass
from lmaas.tracing.trace import Attributes, Kind, Trace
from lmaas.types import Principal

log = logging.getLogger(__name__)

#: A request that has run for less time did not cause its engine to stall, because detecting a stall takes longer.
SUSPECT_S = 8.0


@dataclass(frozen=True, slots=True)
class Inferences:
    """Serves inferences with the services that the composition root built."""

    settings: Settings
    months: Months
    catalog: Catalog
    leases: Leases
    grammars: Grammars
    client: EngineClient
    metrics: GatewayMetrics
    wait_reasons: WaitReasons

    async def serve(self, principal: Principal, inference: AnyInference, sink: Sink) -> None:
        """Serve one inference for a tenant's key. Its answer, or an error after it was accepted, goes to the sink.

        Raises an LmaasError for a request that is not accepted: then nothing was sent, stored or charged. Raises PutBack if the slot of
        background work was taken back before its end.
        """
        protocol = inference.protocol
        try:
            is_checked = await self.check(principal, inference, sink)
        except ReceiverGone:
            return
        inference.record = _record(principal, inference)
        inference.answer = protocol.answer(inference)
        limits = PrincipalLimits(self.months, principal, Bounds(principal.max_queued, self.settings.pool_max_queued))
        ticket = self._ticket(principal, inference)
        deadline_s = inference.work.deadline_s or self.settings.queue_deadline_s
        async with self.leases.open(ticket, inference.record, limits, deadline_s=deadline_s) as opened:
            if opened.left:
                sink.add_to_head(protocol.limit_lines(opened.left))
            self.metrics.requests.begun()
            if inference.trace is not None:
                inference.trace.enter("queue")
            await self._run_accepted(principal, inference, sink, opened, is_checked=is_checked)

    async def check(self, principal: Principal, inference: AnyInference, sink: Sink) -> bool:
        """Find the model of an inference, expand its request, and check it. Returns whether the grammar was checked too, if it has one.

        Raises the LmaasError of a request that cannot be accepted, and ReceiverGone if the client has disconnected.
        """
        protocol, request = inference.protocol, inference.request
        inference.tenant_id = principal.tenant_id or ""
        inference.model = await self.catalog.resolve(inference.tenant_id, request.model)
        sink.add_to_head(inference.model.head_line)
        inference.model.check_kind(protocol.kind, request.model, protocol.path)
        sink.watch()
        await protocol.expand(inference.tenant_id, request)
        request.check(inference.model.base)
        if request.must_be_checked:
            try:
                await self._check_grammar(principal, inference, sink)
            except NoCheckerError:
                # On a Ray cluster without replicas there is no checker. The host of the replica that serves this request will have one.
                return False
        return True

    async def _run_accepted(
        self, principal: Principal, inference: AnyInference, sink: Sink, opened: OpenTicket, *, is_checked: bool
    ) -> None:
        """Run an accepted request. Whatever happens, it ends with one answer and one usage event."""
        record = inference.record
        try:
            rest = await self._deliver(principal, inference, sink, opened, is_checked=is_checked)
            record.end(UsageStatus.COMPLETED)
            # The engine is done, so the slot is free for the next request while the answer is stored and the client reads the rest.
            self.leases.settle(opened)
            await inference.protocol.keep(inference)
            await _finish(inference, sink, rest)
        except ReceiverGone:
            record.count(inference.answer.usage_if_left)
        except PutBack:
            record.end(UsageStatus.WASTED, PUT_BACK)
            raise
        except LmaasError as error:
            # Past its deadline a request has expired; everything else that ends here has failed.
            expired = isinstance(error, Unavailable) and error.error_code == Unavailable.code
            _failed(inference, UsageStatus.EXPIRED if expired else UsageStatus.FAILED, error.error_code)
            await self._answer_error(inference, sink, error)
        except asyncio.CancelledError:
            if inference.work.durable:
                # It runs again elsewhere.
                record.end(UsageStatus.WASTED, STOPPED)
                raise
            # The gateway stops and its drain time is over. The client gets an error instead of a silent end.
            _failed(inference, UsageStatus.FAILED, "gateway_stopped")
            stopping = Unavailable("The gateway is stopping. Retry after 1 s.", code="gateway_stopped", retry_after_s=1)
            await self._answer_error(inference, sink, stopping)
            raise
        except Exception:
            # The request was accepted, so it gets its response and its one usage event here. The log has the details.
            log.exception("unexpected error", extra={"request_id": inference.request_id, "tenant_id": inference.tenant_id})
            _failed(inference, UsageStatus.FAILED, "internal_error")
            await self._answer_error(inference, sink, InternalError())
        finally:
            self.metrics.requests.ended(
                inference.protocol.path,
                record.status,
                queue_s=record.queue_ms / 1000,
                first_s=inference.first_s,
                total_s=time.monotonic() - inference.began,
                prompt=record.prompt_tokens,
                cached=record.cached_tokens,
                completion=record.completion_tokens,
                trace_id="" if inference.trace is None else inference.trace.trace_id,
                tenant=principal.tenant_name or "",
            )

    async def _deliver(self, principal: Principal, inference: AnyInference, sink: Sink, opened: OpenTicket, *, is_checked: bool) -> bytes:
        """Wait for a lease and deliver; once more if an engine is lost before the client has had anything.

        Returns the events of a stream that precede the answer's end. Raises ReceiverGone if the client went away.
        """
        delivery = Delivery(inference, sink, self.client)
        record, request = inference.record, inference.request
        sink.on_gone(opened.wake)
        while True:
            lease = await self._leased(inference, sink, opened)
            if not is_checked:
                try:
                    await self._check_grammar(principal, inference, sink)
                except NoCheckerError:
                    raise unavailable() from None
                is_checked = True
            record.start(lease.replica, lease.queue_ms, lease.load_ms)
            began = time.monotonic()
            if inference.trace is not None:
                _trace_delivery(inference.trace, inference, lease)
            try:
                rest = await delivery.attempt(lease, opened)
            except EngineLost as lost:
                if sink.gone.is_set():
                    raise ReceiverGone from lost
                if opened.yielded:
                    raise PutBack from lost
                extra = {"request_id": inference.request_id, "replica_id": lease.replica, "detail": str(lost)}
                log.warning("a delivery failed", extra=extra)
                if delivery.begun:
                    raise EngineFailed(
                        "The engine failed after it had sent a part of the answer, which is charged. "
                        "Send the request again for a whole answer."
                    ) from lost
                # The client has received nothing of this attempt.
                record.count({})
                if lost.revoked and request.constrained and time.monotonic() - began > SUSPECT_S:
                    # The engine may have stalled on the request's grammar, so the request is not sent to another engine.
                    raise EngineFailed("The engine stalled on this request. Simplify its schema or its tools before you retry.") from lost
                inference.answer = inference.protocol.answer(inference)
                if inference.trace is not None:
                    inference.trace.enter("queue", failed=EngineFailed.code)
                await opened.retry(lease, lost.reason)
            else:
                if sink.gone.is_set():
                    raise ReceiverGone
                return rest

    async def _leased(self, inference: AnyInference, sink: Sink, opened: OpenTicket) -> Lease:
        """Wait for a lease and return it. Meanwhile a streaming client gets reports about its wait. Raises ReceiverGone."""
        pause_s = FIRST_COMMENT_S
        while not sink.gone.is_set():
            try:
                lease = await opened.wait(pause_s)
            except Unavailable as late:
                raise await self.wait_reasons.explained(late, opened.ticket.pool) from None
            if sink.gone.is_set():
                break
            if opened.yielded:
                raise PutBack
            if lease is not None:
                return lease
            pause_s = COMMENT_EVERY_S
            if inference.request.stream:
                reason = await self.wait_reasons.why(opened.ticket.pool)
                await sink.start(200, STREAM_HEADERS)
                await sink.write(inference.protocol.waiting(comments(opened.standing, reason, time.monotonic())))
        raise ReceiverGone

    async def _check_grammar(self, principal: Principal, inference: AnyInference, sink: Sink) -> None:
        await check_grammar(self.grammars, principal, inference, sink, self.settings.queue_deadline_s)

    async def _answer_error(self, inference: AnyInference, sink: Sink, error: LmaasError) -> None:
        """Send an error response, or events that end the stream if the response has begun."""
        protocol = inference.protocol
        self.metrics.refused(protocol.path, error.kind, error.error_code)
        log_settings_error(error, inference.request_id, protocol.path)
        if sink.started:
            await sink.finish(inference.answer.failed(error), complete=False)
            return
        body = protocol.error_body(error, inference.request_id)
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
        head = {"content-type": "application/json", "content-length": str(len(text)), **error.headers()}
        await sink.start(protocol.error_status(error), head)
        await sink.finish(text)

    def _ticket(self, principal: Principal, inference: AnyInference) -> Ticket:
        model, record, request, work = inference.model, inference.record, inference.request, inference.work
        service = _service_tier(inference)
        prompt_tokens, completion_tokens = request.estimate(model.base.max_model_len)
        return Ticket(
            id=record.request_id,
            pool=model.base.id,
            tenant=inference.tenant_id,
            gateway=self.leases.gateway,
            adapter=model.adapter,
            source=model.source,
            weight=request.weight,
            event=record.event(),
            share=tier(principal.tier).share * service.share,
            head_start=service.head_start,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            prices=(record.prompt_price, record.cached_price, record.completion_price),
            limits=limited_scopes(principal, rate_limited=work.rate_limited),
            background=work.work_class is WorkClass.BACKGROUND,
            durable=work.durable,
        )


def _trace_delivery(trace: Trace, inference: AnyInference, lease: Lease) -> None:
    """Begin the stage of the engine's work. The last part of the wait was for the adapter, if it had to be loaded."""
    replica: Attributes = {"lmaas.replica.id": lease.replica}
    if lease.load_ms:
        trace.enter("load", replica, began_s=lease.load_ms / 1000)
    named: Attributes = {"gen_ai.operation.name": operation(inference.protocol.path), "gen_ai.provider.name": "vllm"}
    trace.enter("delivery", {**replica, **named, "gen_ai.request.model": inference.model.shown}, kind=Kind.CLIENT)


def _failed(inference: AnyInference, status: UsageStatus, code: str) -> None:
    """Record a failure. The client of an answer in one piece has received nothing of it, and pays nothing."""
    if not inference.request.stream:
        inference.record.count({})
    inference.record.end(status, code)


async def _finish(inference: AnyInference, sink: Sink, rest: bytes) -> None:
    """Send the end of a stream, or the whole answer."""
    last = inference.answer.end()
    if not inference.request.stream:
        await sink.start(200, {"content-type": "application/json", "content-length": str(len(last))})
    await sink.finish(rest + last)


def _service_tier(inference: AnyInference) -> ServiceTier:
    """Return the service tier of a request. Work with a price of its own has the usual one, whatever its request contains."""
    if inference.work.price_percent is not None:
        return ServiceTier(1.0, 0, inference.work.price_percent)
    return SERVICE_TIERS[inference.request.service_tier]


def _record(principal: Principal, inference: AnyInference) -> UsageRecord:
    model, request, work = inference.model, inference.request, inference.work
    percent = _service_tier(inference).price_percent
    return UsageRecord(
        request_id=inference.request_id,
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
        work=work.work_class,
        durable=work.durable,
    )
