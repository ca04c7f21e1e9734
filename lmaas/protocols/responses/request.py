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
from lmaas.protocols.responses.items import check_storable, messages_of
from lmaas.protocols.responses.parameters import AS_IN_CHAT, LOGPROBS, TABLE
from lmaas.protocols.responses.state import Item
from lmaas.protocols.responses.tools import Tools, repeated_choice
from lmaas.store.models import BaseModel

#: The roles whose messages are never left out.
_INSTRUCTING = ("system", "developer")
#: A context that every prompt fits into.
_UNBOUNDED = 2**31
_NO_TOOLS = Tools([], [], frozenset(), {})
_NO_REASONING: Mapping[str, Any] = {"effort": None, "summary": None}
#: The format for the engine, and the object that the response has.
_PLAIN_TEXT: tuple[Any, dict[str, Any]] = (None, {"format": {"type": "text"}})
#: Fields that the response repeats as they were given, with their defaults.
_REPEATED: Mapping[str, Any] = {
    "frequency_penalty": 0.0,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "prompt_cache_retention": None,
    "safety_identifier": None,
    "store": True,
    "temperature": 1.0,
    "top_logprobs": 0,
    "truncation": "disabled",
    "user": None,
}
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


@dataclass(frozen=True, slots=True)
class BackgroundRun:
    """The data of a response in the background from its creation, and the number of the first event of this run."""

    response_id: str
    created_at: int
    first_event: int


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
    #: True if old items may be left out of a prompt that is too long.
    truncates: bool
    #: The engine's names of the custom tools.
    custom: frozenset[str]
    #: The namespace and the name of each tool in a namespace, by the engine's name.
    namespaces: Mapping[str, tuple[str, str]]
    repeated: dict[str, Any]
    #: Set for a response in the background by those that create or run it.
    run: BackgroundRun | None = None

    @property
    def references(self) -> dict[str, str]:
        """The place of each item that is only referred to, by its id."""
        return {item["id"]: f"input[{place}].id" for place, item in enumerate(self.items) if item["type"] == "item_reference"}

    def expand(self, context: list[Item], referred: Mapping[str, Item]) -> None:
        """Put these items before the request's own, and the items that are referred to in their places.

        Raises NotFound with the place of a reference to an item that is not among them, and InvalidRequest if there is nothing to answer.
        """
        for item_id, place in self.references.items():
            if item_id not in referred:
                raise NotFound(f"The item '{item_id[:100]}' does not exist. Send the item itself instead of a reference.", param=place)
        if self.references:
            self.items = [referred[item["id"]] if item["type"] == "item_reference" else item for item in self.items]
            if self.store:
                check_storable(self.items)
        messages = self.parameters["messages"] = messages_of(self.instructions, [*context, *self.items])
        if not messages:
            raise _nothing_to_answer()

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


def read_response(body: dict[str, Any], *, may_store: bool = True) -> ResponsesRequest:
    """Read a `/v1/responses` request. Raises InvalidRequest with the wrong field.

    Without `may_store` nothing will be stored, whatever the request contains.
    """
    model = read_model(body)
    given = read_parameters(TABLE, body)
    items = _items(given)
    background = given.get("background", False)
    if background and not given.get("store", True):
        raise InvalidRequest("'store: false' cannot be used with 'background', whose response is stored. Send one of them.", param="store")
    is_stored = may_store and given.get("store", True)
    if is_stored:
        check_storable(items)
    # References are resolved later, and so may be everything before the input.
    own = [item for item in items if item["type"] != "item_reference"]
    messages = messages_of(given.get("instructions"), own)
    if not messages and len(own) == len(items) and given.keys().isdisjoint(("previous_response_id", "conversation")):
        raise _nothing_to_answer()
    parameters = {"messages": messages} | _sampling(given)
    tools: Tools = given.get("tools", _NO_TOOLS)
    tools_as_sent: list[Any] = []
    if tools.for_engine or "tool_choice" in given:
        parameters |= {"tools": tools.for_engine, "tool_choice": given.get("tool_choice")}
        tools_as_sent = settle_tools(parameters, legacy=False)
    # The client's own value: for 0 the engine gets the smallest number that it accepts.
    top_p = body["top_p"] if "top_p" in given else 1.0
    return ResponsesRequest(
        model=model,
        stream=given.get("stream", False),
        weight=1,
        prompts=1,
        service_tier=given.get("service_tier", "default"),
        parameters=parameters,
        names=NAMES,
        tools_as_sent=tools_as_sent,
        instructions=given.get("instructions"),
        items=items,
        previous_response_id=given.get("previous_response_id"),
        conversation_id=given.get("conversation"),
        store=is_stored,
        wants_logprobs=LOGPROBS in given.get("include", ()),
        truncates=given.get("truncation") == "auto",
        custom=tools.custom,
        namespaces=tools.namespaces,
        repeated={"model": model, "top_p": top_p} | _repeated(given, tools),
        background=background,
    )


def _items(given: dict[str, Any]) -> list[Item]:
    """Return the request's own input, which may be empty if it continues something. Raises InvalidRequest if there is nothing to answer."""
    conversation = given.get("conversation")
    if conversation is not None and "previous_response_id" in given:
        raise InvalidRequest("'previous_response_id' and 'conversation' cannot be used together. Send one of them.", param="conversation")
    if conversation is not None and not given.get("store", True):
        raise InvalidRequest("'store: false' cannot be used with 'conversation', which stores the items. Send one of them.", param="store")
    items: list[Item] = given.get("input", [])
    if not items and conversation is None and "previous_response_id" not in given:
        if "input" in given:
            raise _nothing_to_answer()
        raise InvalidRequest("'input' is required. Add it to the request.", code="missing_parameter", param="input")
    return items


def _nothing_to_answer() -> InvalidRequest:
    return InvalidRequest("'input' must have at least one item for the model, such as a message.", code="empty_prompt", param="input")


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    """Return the engine's parameters, without messages and tools."""
    parameters = {name: given[name] for name in AS_IN_CHAT if name in given}
    limit = given.get("max_output_tokens")
    if limit is not None:
        if given.get("min_tokens", 0) > limit:
            raise out_of_range("min_tokens", "at most max_output_tokens")
        parameters["max_completion_tokens"] = limit
    form, _ = given.get("text", _PLAIN_TEXT)
    if form is not None:
        parameters["response_format"] = form
    effort = given.get("reasoning", _NO_REASONING)["effort"]
    if effort is not None:
        parameters["reasoning_effort"] = effort
    if LOGPROBS in given.get("include", ()):
        parameters |= {"logprobs": True, "top_logprobs": given.get("top_logprobs", 0)}
    return parameters


def _repeated(given: dict[str, Any], tools: Tools) -> dict[str, Any]:
    """Return the fields of the response that repeat the request, with OpenAI's defaults."""
    conversation, choice = given.get("conversation"), given.get("tool_choice")
    return {
        "background": given.get("background", False),
        "conversation": None if conversation is None else {"id": conversation},
        "metadata": given.get("metadata", {}),
        "reasoning": given.get("reasoning", _NO_REASONING),
        "text": given.get("text", _PLAIN_TEXT)[1],
        "tool_choice": "auto" if choice is None else repeated_choice(choice, tools.custom),
        "tools": tools.repeated,
        **{name: given.get(name, default) for name, default in _REPEATED.items()},
    }
