"""Reads a request of the Messages protocol, and builds the chat for the engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmaas.admission.estimate import estimate
from lmaas.errors import InvalidRequest
from lmaas.inference.request import EngineRequest
from lmaas.protocols.messages.blocks import joined
from lmaas.protocols.messages.conversation import Conversation
from lmaas.protocols.messages.table import COUNT_TOKENS, MESSAGES
from lmaas.protocols.messages.tools import Choice, Tool, offered
from lmaas.protocols.parameters.reading import read_model, read_parameters
from lmaas.protocols.parameters.table import Table
from lmaas.protocols.parameters.tools import settle_tools
from lmaas.store.models import BaseModel

#: The client's field for each parameter of a chat that an engine's error may blame.
NAMES: Mapping[str, str] = {
    "messages": "messages",
    "tool_calls": "messages",
    "continue_final_message": "messages",
    "tools": "tools",
    "tool_choice": "tool_choice",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "max_tokens": "max_tokens",
    "stop": "stop_sequences",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "chat_template_kwargs": "thinking",
}
_NAMES_WITH_OUTPUT_FORMAT: Mapping[str, str] = {**NAMES, "response_format": "output_format"}
#: The variables by which chat templates switch a model's thinking on and off. A template ignores those that it does not know.
_SWITCHES = ("enable_thinking", "thinking")


@dataclass(slots=True, kw_only=True)
class MessagesRequest(EngineRequest):
    """A checked request. `parameters` are those of a chat."""

    #: True if the client wants to see the model's thoughts.
    shows_thinking: bool
    #: The client's limit, 0 for a request that only counts tokens.
    max_tokens: int

    def check(self, model: BaseModel) -> None:
        """Bound `max_tokens` by the model's context. The protocol requires the parameter, and clients send the same value to all models."""
        if self.max_tokens:
            self.parameters["max_tokens"] = min(self.max_tokens, model.max_model_len)

    def estimate(self, max_model_len: int) -> tuple[int, int]:
        """Return an estimate of the prompt tokens, and the most completion tokens that the answer may have."""
        return estimate(self.parameters, self.prompts, max_model_len)


def read_messages(body: dict[str, Any]) -> MessagesRequest:
    """Read a request for a message. Raises InvalidRequest with the field to blame."""
    return _read(MESSAGES, body)


def read_count_tokens(body: dict[str, Any]) -> MessagesRequest:
    """Read a request to count the tokens of a prompt: its `parameters` are those of the chat. Raises InvalidRequest with the field."""
    return _read(COUNT_TOKENS, body)


def _read(table: Table, body: dict[str, Any]) -> MessagesRequest:
    model = read_model(body)
    given = read_parameters(table, body)
    conversation: Conversation = given.pop("messages")
    system = joined([given.pop("system", ""), *conversation.system])
    messages = conversation.messages
    chat: dict[str, Any] = {"messages": [{"role": "system", "content": system}, *messages] if system else messages}
    if conversation.prefilled:
        chat |= {"continue_final_message": True, "add_generation_prompt": False}
    tools_as_sent = _settle_tools(chat, given, conversation)
    old_format = given.pop("output_format", None)
    chat |= given.pop("output_config", {})
    if old_format is not None:
        if "response_format" in chat:
            raise InvalidRequest(
                "'output_format' and 'output_config.format' cannot be used together. Send one of them.", param="output_format"
            )
        chat["response_format"] = old_format
    thinks, shows_thinking = given.pop("thinking", (False, False))
    chat["chat_template_kwargs"] = dict.fromkeys(_SWITCHES, thinks)
    stream = given.pop("stream", False)
    stops = given.pop("stop_sequences", None)
    if stops:
        chat["stop"] = stops
    return MessagesRequest(
        model=model,
        stream=stream,
        weight=1,
        prompts=1,
        service_tier="default",
        parameters=chat | given,
        names=NAMES if old_format is None else _NAMES_WITH_OUTPUT_FORMAT,
        tools_as_sent=tools_as_sent,
        shows_thinking=shows_thinking,
        max_tokens=given.get("max_tokens", 0),
    )


def _settle_tools(chat: dict[str, Any], given: dict[str, Any], conversation: Conversation) -> list[Any]:
    """Move the tools and the choice among them into the chat. Returns the tools as they came if some were made strict."""
    tools: list[Tool] = given.pop("tools", [])
    choice: Choice | None = given.pop("tool_choice", None)
    chat["tools"] = offered(tools, conversation.tools, choice)
    if choice is not None:
        chat["tool_choice"] = choice.form
        if not choice.parallel and chat["tools"]:
            chat["parallel_tool_calls"] = False
    return settle_tools(chat, legacy=False)
