"""Log probabilities as responses have them."""

import msgspec


class _Alternative(msgspec.Struct):
    token: str
    logprob: float = -9999.0
    bytes: list[int] | None = None


class _Token(_Alternative):
    top_logprobs: list[_Alternative] = []


class _Logprobs(msgspec.Struct):
    content: list[_Token] | None = None


_read = msgspec.json.Decoder(_Logprobs | None).decode


def tokens_of(logprobs: msgspec.Raw) -> bytes:
    """Return the tokens of a choice's log probabilities as JSON objects with commas between them. Raises ValueError if they are none."""
    found = _read(logprobs)
    tokens = (found.content if found else None) or []
    for token in tokens:
        for each in (token, *token.top_logprobs):
            each.bytes = each.bytes or []
    return msgspec.json.encode(tokens)[1:-1]
