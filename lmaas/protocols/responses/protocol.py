"""`/v1/responses` as a protocol."""

from collections.abc import Collection
from typing import Any

from lmaas.errors import InvalidRequest
from lmaas.inference.protocol import Answer, Inference, Protocol
from lmaas.protocols.responses.answer import ResponseAnswer, StreamedResponse, WholeResponse
from lmaas.protocols.responses.items import named, parts_of
from lmaas.protocols.responses.request import ResponsesRequest, read_response
from lmaas.protocols.responses.state import NewResponse, State
from lmaas.protocols.responses.turns import PARTS_IN_PLACE, Turns
from lmaas.protocols.text import chat_ids

#: The most items and parts of them that are put before a request's own.
MAX_CONTEXT_PARTS = 50_000


class Responses(Protocol[ResponsesRequest]):
    """`/v1/responses`, translated to the engine's chat endpoint."""

    path, engine_path = "/v1/responses", "/v1/chat/completions"
    texts = ("input", "instructions")

    def __init__(self, state: State) -> None:
        self._state, self._turns = state, Turns()

    def read(self, body: dict[str, Any]) -> ResponsesRequest:
        """Check a client's body and return the request for the engine."""
        return read_response(body)

    def engine_ids(self, request_id: str, request: ResponsesRequest) -> list[str]:
        """Return the engine's id of the request."""
        return chat_ids(request_id)

    def answer(self, inference: Inference[ResponsesRequest]) -> Answer:
        """Return a new answer for an attempt."""
        return StreamedResponse(inference) if inference.request.stream else WholeResponse(inference)

    async def expand(self, tenant_id: str, request: ResponsesRequest) -> None:
        """Add the items before the request's own, and those that it refers to. Raises NotFound for what this tenant does not have."""
        if request.background and request.run is None:
            raise InvalidRequest(
                "'background' must be false in a batch, which runs without its client in any case. Leave it out.",
                code="unsupported_parameter",
                param="background",
            )
        references = request.references
        if request.previous_response_id is None and request.conversation_id is None and not references:
            return
        # A turn of its own, until the items are translated: many contexts at a time would take much memory.
        await self._turns.take(tenant_id, lambda: self._expand(tenant_id, request, references))

    async def _expand(self, tenant_id: str, request: ResponsesRequest, references: Collection[str]) -> None:
        previous, conversation = request.previous_response_id, request.conversation_id
        context = []
        if previous is not None or conversation is not None:
            context = await self._state.context_of(tenant_id, previous_response_id=previous, conversation_id=conversation)
        referred = await self._state.items_of(tenant_id, references) if references else {}
        parts = parts_of([*context, *referred.values()])
        if parts > MAX_CONTEXT_PARTS:
            # Each takes half a kilobyte of memory while the request waits and runs.
            raise InvalidRequest(
                f"Before the input are {parts:,} items and parts of text, at most {MAX_CONTEXT_PARTS:,} are possible. "
                "Begin a new conversation or chain, with fewer parts.",
                code="context_too_large",
                param="conversation" if conversation is not None else "previous_response_id" if previous is not None else "input",
            )
        await self._turns.apart(lambda: request.expand(context, referred), is_large=parts > PARTS_IN_PLACE)

    async def keep(self, inference: Inference[ResponsesRequest]) -> None:
        """Store the response, unless the client has turned storing off."""
        new = self.new_response(inference)
        if new is not None:
            await self._state.store(inference.tenant_id, new)

    def new_response(self, inference: Inference[ResponsesRequest]) -> NewResponse | None:
        """Return the response to a request that has its answer. None if the client has turned storing off."""
        request, answer = inference.request, inference.answer
        if not request.store or not isinstance(answer, ResponseAnswer):
            return None
        return NewResponse(
            answer.response_id,
            answer.response(),
            named(request.items, answer.response_id),
            request.previous_response_id,
            request.conversation_id,
        )
