"""A checked request in the form that an engine takes, whatever protocol its client speaks."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lmaas.errors import InvalidRequest
from lmaas.store.models import BaseModel

#: The parameters from which an engine makes its grammar.
GRAMMAR_PARAMETERS = ("response_format", "tools", "tool_choice", "parallel_tool_calls", "structured_outputs")


@dataclass(slots=True, kw_only=True)
class EngineRequest(ABC):
    """A checked request. Each protocol, or group of protocols, has a subclass for what it needs beside this.

    `parameters` is what the engine receives, without what `body` adds. Of the rest, nothing depends on the engine that serves it.
    """

    #: The model's name as the client wrote it.
    model: str
    stream: bool
    #: The slots that the request takes.
    weight: int
    #: The number of its prompts.
    prompts: int
    #: A key of SERVICE_TIERS.
    service_tier: str
    parameters: dict[str, Any]
    #: The client's field for each parameter of the engine that an error may blame. One that is missing belongs to the service.
    names: Mapping[str, str]
    #: The tools as the client sent them, if they were made strict here for a call that is required. Empty otherwise.
    tools_as_sent: list[Any] = field(default_factory=list)
    #: True if it runs without its client, which reads the answer later.
    background: bool = False

    @property
    def parts(self) -> int:
        """The number of requests to the engine that make up this one, which are sent one after the other."""
        return 1

    @abstractmethod
    def check(self, model: BaseModel) -> None:
        """Raise InvalidRequest for what this model cannot do, or what cannot fit into its context."""

    @abstractmethod
    def estimate(self, max_model_len: int) -> tuple[int, int]:
        """Return an estimate of the prompt tokens, and the most completion tokens that the answer may have."""

    def body(self, engine_name: str, cache_salt: str, part: int = 0, priority: int = 0) -> bytes:
        """Return the engine's request body of one part. The salt keeps tenants from timing each other's cached prompts. A request with a
        `priority` above 0 gives way to others inside the engine."""
        extra: dict[str, Any] = {"model": engine_name, "cache_salt": cache_salt, "stream": self.stream}
        if priority:
            extra["priority"] = priority
        if self.stream:
            extra["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        try:
            return msgspec.json.encode(self.parameters | extra)
        except OverflowError:
            # An integer of more than 64 bits, as a schema may hold one.
            return json.dumps(self.parameters | extra, ensure_ascii=False, separators=(",", ":")).encode()

    def clients_name(self, parameter: str) -> str | None:
        """Return the client's field for a parameter of the engine, None if the client has none."""
        return self.names.get(parameter)

    @property
    def prompt_field(self) -> str:
        """The client's field that holds the prompt."""
        name = next((each for each in ("messages", "prompt", "input") if each in self.parameters), "input")
        return self.clients_name(name) or name

    @property
    def constrained(self) -> bool:
        """True if the engine compiles a grammar for the answer."""
        asked = self.parameters
        if asked.get("structured_outputs") or asked.get("response_format", {}).get("type", "text") != "text":
            return True
        choice = asked.get("tool_choice", "auto")
        if not asked.get("tools") or choice == "none":
            return False
        # With `auto`, calls are free text unless a tool is strict or their number is limited.
        strict = any(tool["function"].get("strict") for tool in asked["tools"])
        return choice != "auto" or strict or asked.get("parallel_tool_calls") is False

    @property
    def must_be_checked(self) -> bool:
        """True if an engine may compile a grammar. Some tool parsers do so for every request with tools."""
        return self.constrained or (bool(self.parameters.get("tools")) and self.parameters.get("tool_choice") != "none")

    @property
    def grammar(self) -> dict[str, Any]:
        """The parameters from which the engine compiles its grammar, by name; without descriptions of tools, which agents change often."""
        found = {name: value for name in GRAMMAR_PARAMETERS if (value := self.parameters.get(name)) is not None}
        if tools := found.get("tools"):
            found["tools"] = [
                tool | {"function": {name: value for name, value in tool["function"].items() if name != "description"}} for tool in tools
            ]
        return found

    @property
    def grammar_field(self) -> str:
        """The client's field from which the engine makes the grammar of a constrained request."""
        asked = self.parameters
        name = next((each for each in ("structured_outputs", "response_format") if each in asked), "tools")
        if asked.get("tools") and asked.get("tool_choice", "auto") not in ("auto", "none"):
            name = "tools"
        return self.clients_name(name) or name

    def loosen(self) -> bool:
        """Give the engine the tools as the client sent them, because it cannot enforce them. Returns whether that changes anything."""
        if not self.tools_as_sent:
            return False
        self.parameters["tools"] = self.tools_as_sent.copy()
        self.tools_as_sent.clear()
        return True


def context_exceeded(param: str, max_model_len: int, found: str) -> InvalidRequest:
    """Return the error for a prompt that is too long. It begins as OpenAI's does, because clients look for these words."""
    message = f"This model's maximum context length is {max_model_len} tokens. However, your prompt {found}. Please shorten it."
    return InvalidRequest(message, code="context_length_exceeded", param=param)
