"""The counts of Anthropic's and OpenAI's protocols: the tokens of the prompt that a message or a response would have."""

from typing import Any

from lmaas.engine.grammars.verdict import Tokens
from lmaas.inference.counting import Counting, PromptRequest
from lmaas.protocols.messages.request import read_count_tokens
from lmaas.protocols.messages.table import COUNT_TOKENS
from lmaas.protocols.parameters.reading import read_parameters
from lmaas.protocols.parameters.table import Table, accepted
from lmaas.protocols.responses.parameters import TABLE as RESPONSES
from lmaas.protocols.responses.protocol import Responses
from lmaas.protocols.responses.request import ResponsesRequest, read_response
from lmaas.store.models import BaseModel

CHAT = "/v1/chat/completions"
_OF_THE_PROMPT = (
    "input",
    "instructions",
    "previous_response_id",
    "conversation",
    "truncation",
    "reasoning",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "text",
    "chat_template_kwargs",
)
INPUT_TOKENS = Table(
    "input_tokens",
    "/v1/responses/input_tokens",
    (),
    (
        *(RESPONSES.by_name[name] for name in _OF_THE_PROMPT),
        accepted("personality", "the models have no styles of their own; put one into the instructions"),
    ),
)


class CountTokens(Counting):
    """`/v1/messages/count_tokens`."""

    path = COUNT_TOKENS.path
    texts = ("messages", "system")

    def read(self, body: dict[str, Any]) -> PromptRequest:
        """Check a client's body. Raises InvalidRequest with the field that is wrong."""
        return PromptRequest.of(read_count_tokens(body), CHAT)

    def answer(self, tokens: Tokens, model: BaseModel) -> dict[str, Any]:
        """Return the number of tokens."""
        return {"input_tokens": tokens.count}


class InputTokens(Counting):
    """`/v1/responses/input_tokens`, with the items of earlier responses and conversations."""

    path = INPUT_TOKENS.path
    texts = Responses.texts

    def __init__(self, responses: Responses) -> None:
        self._responses = responses

    def read(self, body: dict[str, Any]) -> PromptRequest:
        """Check a client's body. Raises InvalidRequest with the field that is wrong."""
        read_parameters(INPUT_TOKENS, body)
        return PromptRequest.of(read_response(body, may_store=False), CHAT)

    async def expand(self, tenant_id: str, asked: PromptRequest) -> None:
        """Add the items before the request's own, and those that it refers to. Raises NotFound for what this tenant does not have."""
        if isinstance(asked.request, ResponsesRequest):
            await self._responses.expand(tenant_id, asked.request)

    def answer(self, tokens: Tokens, model: BaseModel) -> dict[str, Any]:
        """Return the number of tokens."""
        return {"object": "response.input_tokens", "input_tokens": tokens.count}
