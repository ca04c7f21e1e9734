"""Reads a request of the Responses API, and builds the request for the engine's chat endpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmaas.admission.estimate import estimate
from lmaas.errors import InvalidRequest, NotFound
from lmaas.protocols.parameters.checks import out_of_range
from lmaas.protocols.parameters.reading import read_model, read_parameters
from lmaas.protocols.parameters.request import TextRequest
from lmaas.protocols.parameters.tools import settle_tools
from lmaas.protocols.responses.items import messages_of
from lmaas.protocols.responses.parameters import AS_IN_CHAT, LOGPROBS, TABLE
from lmaas.protocols.responses.state import Item
from lmaas.protocols.responses.tools import Tools, repeated_choice
from lmaas.store.models import BaseModel

#: The roles whose messages are never left out.
_INSTRUCTING = ("system", "developer")
#: A context that every prompt fits into.
_UNBOUNDED = 2**31
_NO_TOOLS = Tools([], [], frozenset(), {})
_REPEATED_AS_GIVEN = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "max_tool_calls")
#: The client's field for each parameter of the engine that an error may blame.
NAMES: Mapping[str, str] = {name: name for name in (*AS_IN_CHAT, "tools", "tool_choice", "top_logprobs")} | {
    "messages": "input",
    "tool_calls": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "top_logprobs",
}


@dataclass(slots=True, kw_only=True)
class ResponsesRequest(TextRequest):
    """A checked request of the Responses API.

    `items` are the request's own input, whose references are resolved by `expand`. `repeated` are the fields of the response that follow
    from the request.
    """

    instructions: str | None
    items: list[Item]
    previous_response_id: str | None
    conversation_id: str | None
    store: bool
    wants_logprobs: bool
    #: Whether old items may be left out of a prompt that is too long.
    truncates: bool
    #: The engine's names of the custom tools.
    custom: frozenset[str]
    #: The namespace and the name of each tool in a namespace, by the engine's name.
    namespaces: Mapping[str, tuple[str, str]]
    repeated: dict[str, Any]

    @property
    def references(self) -> dict[str, str]:
        """The place of each item that is only referred to, by its id."""
        return {item["id"]: f"input[{place}].id" for place, item in enumerate(self.items) if item["type"] == "item_reference"}

    def expand(self, context: list[Item], referred: Mapping[str, Item]) -> None:
        """Put these items before the request's own, and the items that are referred to in their places.

        Raises NotFound with the place of a reference to an item that is not among them.
        """
        for item_id, place in self.references.items():
            if item_id not in referred:
                raise NotFound(f"The item '{item_id[:100]}' does not exist. Send the item itself instead of a reference.", param=place)
        self.items = [referred[item["id"]] if item["type"] == "item_reference" else item for item in self.items]
        self.parameters["messages"] = messages_of(self.instructions, [*context, *self.items])

    def check(self, model: BaseModel) -> None:
        """Raise InvalidRequest for what cannot fit into the model's context. With `truncation: auto`, leave out old messages before."""
        TextRequest.check(self, model)
        if self.truncates:
            self._truncate(model.max_model_len)

    def _truncate(self, max_model_len: int) -> None:
        """Leave out the oldest messages, except those of the system and the last one, until the estimate of the prompt fits.

        A tool's output is never left without its call.
        """
        messages = self.parameters["messages"]
        room = max_model_len - min(self.parameters.get("max_completion_tokens", 0), max_model_len // 2)
        size, _ = estimate(self.parameters, 1, _UNBOUNDED)
        if size <= room:
            return
        always = [message for message in messages if message["role"] in _INSTRUCTING]
        others = [message for message in messages if message["role"] not in _INSTRUCTING]
        last = len(others) - 1
        while last > 0 and others[last]["role"] == "tool":
            last -= 1
        first = 0
        while first < last and (size > room or others[first]["role"] == "tool"):
            size -= estimate({"messages": [others[first]]}, 1, _UNBOUNDED)[0]
            first += 1
        self.parameters["messages"] = always + others[first:]


def read_response(body: dict[str, Any]) -> ResponsesRequest:
    """Read a `/v1/responses` request. Raises InvalidRequest with the field to blame."""
    model = read_model(body)
    given = read_parameters(TABLE, body)
    previous, conversation = given.get("previous_response_id"), given.get("conversation")
    if previous is not None and conversation is not None:
        raise InvalidRequest("'previous_response_id' and 'conversation' cannot be used together. Send one of them.", param="conversation")
    if conversation is not None and not given.get("store", True):
        raise InvalidRequest("'store: false' cannot be used with 'conversation', which stores the items. Send one of them.", param="store")
    continues = previous is not None or conversation is not None
    items: list[Item] | None = given.get("input")
    if items is None and not continues:
        raise InvalidRequest("'input' is required. Add it to the request.", code="missing_parameter", param="input")
    if not items and not continues:
        raise InvalidRequest("'input' must have at least one item.", code="empty_prompt", param="input")
    items = items or []
    instructions = given.get("instructions")
    form, text = given.get("text", (None, {"format": {"type": "text"}}))
    reasoning = given.get("reasoning", {"effort": None, "summary": None})
    tools: Tools = given.get("tools", _NO_TOOLS)
    choice = given.get("tool_choice")
    limit, wants_logprobs = given.get("max_output_tokens"), LOGPROBS in given.get("include", ())
    if limit is not None and given.get("min_tokens", 0) > limit:
        raise out_of_range("min_tokens", "at most max_output_tokens")
    # References are resolved later, and so may be everything before the input.
    own = [item for item in items if item["type"] != "item_reference"]
    parameters: dict[str, Any] = {"messages": messages_of(instructions, own)}
    parameters |= {name: given[name] for name in AS_IN_CHAT if name in given}
    if limit is not None:
        parameters["max_completion_tokens"] = limit
    if form is not None:
        parameters["response_format"] = form
    if reasoning["effort"] is not None:
        parameters["reasoning_effort"] = reasoning["effort"]
    if wants_logprobs:
        parameters |= {"logprobs": True, "top_logprobs": given.get("top_logprobs", 0)}
    tools_as_sent: list[Any] = []
    if tools.for_engine or choice is not None:
        parameters |= {"tools": tools.for_engine, "tool_choice": choice}
        tools_as_sent = settle_tools(parameters, legacy=False)
    stream, store = given.get("stream", False), given.get("store", True)
    repeated = {
        "background": False,
        "conversation": None if conversation is None else {"id": conversation},
        "frequency_penalty": given.get("frequency_penalty", 0.0),
        "instructions": instructions,
        "max_output_tokens": limit,
        "metadata": given.get("metadata", {}),
        "model": model,
        "parallel_tool_calls": given.get("parallel_tool_calls", True),
        "presence_penalty": given.get("presence_penalty", 0.0),
        "previous_response_id": previous,
        "reasoning": reasoning,
        "store": store,
        "temperature": given.get("temperature", 1.0),
        "text": text,
        "tool_choice": "auto" if choice is None else repeated_choice(choice, tools.custom),
        "tools": tools.repeated,
        "top_logprobs": given.get("top_logprobs", 0),
        "top_p": body["top_p"] if "top_p" in given else 1.0,
        "truncation": given.get("truncation", "disabled"),
    } | {name: given.get(name) for name in _REPEATED_AS_GIVEN}
    return ResponsesRequest(
        model=model,
        stream=stream,
        weight=1,
        prompts=1,
        service_tier=given.get("service_tier", "default"),
        parameters=parameters,
        names=NAMES,
        tools_as_sent=tools_as_sent,
        instructions=instructions,
        items=items,
        previous_response_id=previous,
        conversation_id=conversation,
        store=store,
        wants_logprobs=wants_logprobs,
        truncates=given.get("truncation") == "auto",
        custom=tools.custom,
        namespaces=tools.namespaces,
        repeated=repeated,
    )
