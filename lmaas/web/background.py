"""Creates responses in the background, and sends their events to the clients that created them."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta

import msgspec

from lmaas.admission.tiers import tier
from lmaas.inference.protocol import Inference
from lmaas.inference.serving import Inferences
from lmaas.inference.sink import STREAM_HEADERS, ReceiverGone
from lmaas.observability import GatewayMetrics
from lmaas.protocols.responses.answer import StreamedResponse, response_id
from lmaas.protocols.responses.background import creation_events
from lmaas.protocols.responses.event_log import EventLogs
from lmaas.protocols.responses.items import named
from lmaas.protocols.responses.request import BackgroundRun, ResponsesRequest
from lmaas.store.background import NewBackground, create
from lmaas.store.database import Database
from lmaas.store.event_logs import FIRST_EVENT
from lmaas.store.idempotency import Answer, Claim
from lmaas.types import Principal
from lmaas.web.call import Call
from lmaas.web.idempotency import Idempotency

_JSON = "application/json"
#: The outcome of a request that creates a response in the background, in the metrics.
QUEUED = "queued"


class _Created(msgspec.Struct):
    """The fields that are read of a kept answer, which is the response as it was created."""

    id: str


@dataclass(frozen=True, slots=True)
class Background:
    """Creates responses that job runners run. A response is stored before its client receives the first byte."""

    db: Database
    inferences: Inferences
    idempotency: Idempotency
    logs: EventLogs
    metrics: GatewayMetrics
    deadline: timedelta
    kept_for: timedelta

    async def create(
        self, principal: Principal, inference: Inference[ResponsesRequest], body: bytes, call: Call, claim: Claim | None
    ) -> None:
        """Check a request, store its response, and answer with the response as it is now, or with its events as they come.

        `body` is the request as it came. Raises the LmaasError of a request that cannot be accepted. Then nothing was stored.
        """
        if claim is None:
            await self._create(principal, inference, body, call, None)
            return

        async def resume(kept: bytes) -> None:
            created = msgspec.json.decode(kept, type=_Created)
            await self._stream(claim.tenant_id, created.id, call)

        repeats = resume if inference.request.stream else None
        async with self.idempotency.claimed(call, claim, repeats) as sink:
            if sink is not None:
                await self._create(principal, inference, body, call, claim)

    async def _create(
        self, principal: Principal, inference: Inference[ResponsesRequest], body: bytes, call: Call, claim: Claim | None
    ) -> None:
        request, new_id = inference.request, response_id(inference.request_id)
        request.run = BackgroundRun(new_id, int(time.time()), FIRST_EVENT)
        try:
            await self.inferences.check(principal, inference, call)
        except ReceiverGone:
            return
        queued = StreamedResponse(inference).queued()
        new = NewBackground(
            id=new_id,
            key_id=principal.key_id,
            previous_id=request.previous_response_id,
            conversation_id=request.conversation_id,
            request=body,
            input=msgspec.json.encode(named(request.items, new_id)),
            body=queued,
            events=creation_events(queued) if request.stream else None,
        )
        await create(
            self.db,
            inference.tenant_id,
            new,
            most=tier(principal.tier).max_background_responses,
            deadline=self.deadline,
            kept_for=self.kept_for,
            kept=None if claim is None else (claim, Answer(200, _JSON, queued)),
        )
        if claim is not None:
            self.idempotency.kept(claim)
        self.metrics.requests.counted(inference.protocol.path, QUEUED)
        if request.stream:
            await self._stream(inference.tenant_id, new_id, call)
        else:
            await call.start(200, {"content-type": _JSON, "content-length": str(len(queued))})
            await call.finish(queued)

    async def _stream(self, tenant_id: str, new_id: str, call: Call) -> None:
        """Send the events of a response until its end, or until the client disconnects, which does not matter to the response."""
        events = await self.logs.follow(tenant_id, new_id, None)
        call.watch()
        sending = asyncio.create_task(_send(events, call), name=f"events-{new_id}")

        def leave() -> None:
            sending.cancel()

        undo = call.on_gone(leave)
        try:
            await asyncio.wait({sending})
            if not sending.cancelled():
                sending.result()
        finally:
            undo()
            sending.cancel()


async def _send(events: AsyncIterator[bytes], call: Call) -> None:
    await call.start(200, STREAM_HEADERS)
    async for chunk in events:
        await call.write(chunk)
    await call.finish()
