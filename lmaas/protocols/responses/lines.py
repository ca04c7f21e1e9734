"""The protocol of responses in lines of batches."""

from datetime import timedelta

from lmaas.inference.protocol import Inference
from lmaas.protocols.responses.protocol import Responses
from lmaas.protocols.responses.request import ResponsesRequest
from lmaas.protocols.responses.state import State
from lmaas.protocols.responses.stored import rows_of
from lmaas.store.conversations import NewTurn


class LineResponses(Responses):
    """`/v1/responses` in a batch. Those who run a line store its response together with the line's end, so that a line that runs twice has
    one response."""

    def __init__(self, state: State, kept_for: timedelta) -> None:
        super().__init__(state)
        self._kept_for = kept_for

    async def keep(self, inference: Inference[ResponsesRequest]) -> None:
        """Store nothing: the response is stored with the end of the line."""

    def turn(self, inference: Inference[ResponsesRequest]) -> NewTurn | None:
        """Return the data to store for an answer that is complete. None if the line has turned storing off."""
        new = self.new_response(inference)
        if new is None:
            return None
        row, items = rows_of(new)
        return NewTurn(row, new.conversation_id, items, self._kept_for)
