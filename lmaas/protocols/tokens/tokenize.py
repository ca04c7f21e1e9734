"""`/v1/tokenize` and `/v1/detokenize`, as vLLM shapes them."""

from typing import Any

from lmaas.engine.grammars.verdict import DETOKENIZE as DETOKENIZE_PATH
from lmaas.engine.grammars.verdict import MAX_RETURNED, Tokens
from lmaas.errors import InvalidRequest
from lmaas.inference.counting import Counting, PromptRequest
from lmaas.protocols.parameters.checks import boolean, out_of_range, wrong_type
from lmaas.protocols.parameters.reading import read_model, read_parameters
from lmaas.protocols.parameters.request import read_chat
from lmaas.protocols.parameters.table import CHAT, COMPLETION, Table, forwarded
from lmaas.store.models import BaseModel

#: The parameters of a chat that decide about its prompt.
CHATS = (
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "reasoning_effort",
    "tools",
    "tool_choice",
)


def read_text(name: str, value: Any) -> Any:
    """Read a string, which may be empty."""
    if not isinstance(value, str):
        raise wrong_type(name, "a string")
    return value


def read_ids(name: str, value: Any) -> Any:
    """Read a list of token ids."""
    if not isinstance(value, list) or not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**31 for item in value):
        raise wrong_type(name, "a list of token ids")
    if len(value) > MAX_RETURNED:
        raise out_of_range(name, f"a list of at most {MAX_RETURNED} token ids")
    return value


TOKENIZE = Table(
    "tokenize",
    "/v1/tokenize",
    (),
    (
        forwarded("prompt", "a string; either this or messages", read_text),
        *(CHAT.by_name[name] for name in CHATS),
        COMPLETION.by_name["add_special_tokens"],
        forwarded("return_token_strs", "true or false: the answer also has the tokens as strings", boolean),
        CHAT.by_name["chat_template"],
        CHAT.by_name["media_io_kwargs"],
        CHAT.by_name["mm_processor_kwargs"],
    ),
)
DETOKENIZE = Table(
    "detokenize", "/v1/detokenize", ("tokens",), (forwarded("tokens", f"a list of at most {MAX_RETURNED:,} token ids", read_ids),)
)


class Tokenize(Counting):
    """`/v1/tokenize`: the tokens of a text, or of a chat with the model's template."""

    path = TOKENIZE.path
    texts = ("prompt", "messages")

    def read(self, body: dict[str, Any]) -> PromptRequest:
        """Check a client's body. Raises InvalidRequest with the field that is wrong."""
        model = read_model(body)
        given = read_parameters(TOKENIZE, body)
        strings = given.pop("return_token_strs", False)
        if "messages" in given:
            if "prompt" in given:
                raise InvalidRequest("'prompt' and 'messages' cannot be used together. Send one of them.", param="prompt")
            # Read like the chat that it is, so that every rule has one definition.
            request = read_chat({name: body[name] for name in ("model", *given)})
            return PromptRequest.of(request, CHAT.path, ids=True, strings=strings)
        if "prompt" not in given:
            raise InvalidRequest("'prompt' or 'messages' is required. Add it to the request.", code="missing_parameter", param="prompt")
        for name in given:
            if name in CHATS:
                raise InvalidRequest(f"'{name}' needs 'messages', which the request does not have. Remove '{name}'.", param=name)
        return PromptRequest(model, COMPLETION.path, given, ids=True, strings=strings)

    def answer(self, tokens: Tokens, model: BaseModel) -> dict[str, Any]:
        """Return the number of tokens, their ids, and on request their strings."""
        strings = tokens.strings or None
        return {"count": tokens.count, "max_model_len": model.max_model_len, "tokens": tokens.ids, "token_strs": strings}


class Detokenize(Counting):
    """`/v1/detokenize`: the text of tokens."""

    path = DETOKENIZE.path

    def read(self, body: dict[str, Any]) -> PromptRequest:
        """Check a client's body. Raises InvalidRequest with the field that is wrong."""
        return PromptRequest(read_model(body), DETOKENIZE_PATH, read_parameters(DETOKENIZE, body))

    def answer(self, tokens: Tokens, model: BaseModel) -> dict[str, Any]:
        """Return the text."""
        return {"prompt": tokens.text}
