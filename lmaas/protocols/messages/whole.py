"""A message in one piece."""

from typing import Any

import msgspec

from lmaas.inference.protocol import Answer, Inference
from lmaas.protocols.chunks import ABORTED, Said, read_whole
from lmaas.protocols.messages.message import SERVICE_TIER, arguments_of, message_id, signature, stop_of, tool_id, usage_of
from lmaas.protocols.messages.request import MessagesRequest


class WholeMessage(Answer):
    """Turns the engine's chat completion into a message."""

    def __init__(self, inference: Inference[MessagesRequest]) -> None:
        self._request_id, self._request = inference.request_id, inference.request
        self._usage: dict[str, Any] | None = None
        self._body = b""

    @property
    def usage(self) -> dict[str, Any] | None:
        """The engine's usage."""
        return self._usage

    def take(self, text: bytes) -> None:
        """Turn the engine's response into the message."""
        whole = read_whole(text)
        choice, usage = whole.choices[0], whole.usage
        self._usage = usage.totals()
        self.aborted = choice.finish_reason == ABORTED
        self.complete = self.done = True
        calls = choice.message.tool_calls or []
        reason, sequence = stop_of(
            choice.finish_reason,
            choice.stop_reason,
            tokens=usage.completion_tokens or 0,
            max_tokens=self._request.max_tokens,
            called=bool(calls),
            cut=False,  # an engine returns only calls that it could read
        )
        self._body = msgspec.json.encode(
            {
                "id": message_id(self._request_id),
                "type": "message",
                "role": "assistant",
                "model": self._request.model,
                "content": self._content(choice.message),
                "stop_reason": reason,
                "stop_sequence": sequence,
                "usage": usage_of(usage) | {"service_tier": SERVICE_TIER},
            }
        )

    def end(self) -> bytes:
        """Return the message."""
        return self._body

    def _content(self, said: Said) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = []
        if said.reasoning and self._request.shows_thinking:
            content.append({"type": "thinking", "thinking": said.reasoning, "signature": signature(self._request_id)})
        calls = said.tool_calls or []
        text = said.content or ""
        # White space beside other blocks belongs to the model's form of them.
        if text.strip() or (text and not content and not calls):
            content.append({"type": "text", "text": text})
        for number, call in enumerate(calls):
            function = call.function
            if function is None or function.name is None:
                raise ValueError("a tool call without a name")
            content.append(
                {
                    "type": "tool_use",
                    "id": tool_id(self._request_id, number),
                    "name": function.name,
                    "input": arguments_of(function.arguments or ""),
                }
            )
        return content
