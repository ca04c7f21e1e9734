"""The messages between gateways and checkers, and the limits of a check. This module does not import the engine."""

import msgspec

#: CPU time of one check: validation, compilation and the first masks, in seconds.
CPU_S = 2.0
#: CPU time of the validation alone. The engine's server repeats it in its event loop, which delays every other stream.
VALIDATION_S = 0.5
#: CPU time of the compilation alone. The engine repeats it once, in a thread that the grammars of all tenants share.
COMPILATION_S = 1.0
#: CPU time of one mask. The engine computes one for each token, between two steps of all its requests.
MASK_S = 0.1
#: The address space that a check may use in addition to that at its start, in bytes.
MEMORY_BYTES = 512 * 1024 * 1024
#: The CPU time, and the address space in addition to that at its start, that one reading of a prompt may use.
PROMPT_CPU_S = 5.0
PROMPT_MEMORY_BYTES = 1024 * 1024 * 1024
#: The largest question, and the most tokens of one prompt that are returned beside their number.
MAX_QUESTION_BYTES = 8 * 1024 * 1024
MAX_RETURNED = 200_000
#: Wall-clock time of one check. A busy machine needs more than the CPU time. A check that takes longer gives no verdict.
WALL_S = 30.0

INVALID = "invalid_schema"
TOO_COMPLEX = "schema_too_complex"
#: There is no verdict. The client is not at fault, and nothing is cached.
UNKNOWN = "unknown"


class Verdict(msgspec.Struct, frozen=True, omit_defaults=True, tag="verdict"):
    """The result of a check: whether an engine may compile a grammar.

    `code` is empty if it may; otherwise it is INVALID, TOO_COMPLEX or UNKNOWN, with a `message` for the client and the parameter of the
    request that is at fault. `cpu_s` is the CPU time of the check in seconds.
    """

    code: str = ""
    message: str = ""
    param: str = ""
    cpu_s: float = 0.0


class Question(msgspec.Struct, frozen=True, tag="grammar"):
    """A grammar to check: the endpoint's path (`/v1/chat/completions` or `/v1/completions`), and those parameters of the engine's
    request, by name, from which the engine makes its grammar."""

    path: str
    parameters: dict[str, object]


class Prompt(msgspec.Struct, frozen=True, tag="prompt"):
    """A prompt whose tokens are wanted: the endpoint's path (`/v1/chat/completions`, `/v1/completions` with one text, or DETOKENIZE), and
    the parameters of the engine's request. DETOKENIZE takes `tokens`.

    `ids` and `strings` are whether the tokens themselves are wanted beside their number.
    """

    path: str
    parameters: dict[str, object]
    ids: bool = False
    strings: bool = False


class Tokens(msgspec.Struct, frozen=True, omit_defaults=True, tag="tokens"):
    """The tokens of a prompt, or with DETOKENIZE its text.

    `code` is empty, or INVALID if an engine would refuse the prompt, TOO_COMPLEX if it is too long to be read here, or UNKNOWN; then there
    is a `message` for the client, and the parameter at fault. `cpu_s` is the CPU time in seconds.
    """

    code: str = ""
    message: str = ""
    param: str = ""
    count: int = 0
    ids: list[int] = []
    strings: list[str] = []
    text: str = ""
    cpu_s: float = 0.0


#: The path of a Prompt that is token ids, and whose text is wanted.
DETOKENIZE = "/detokenize"


def key_of(model_id: str = "") -> str:
    """Return the Redis key of the checking host's URL, for all base models or for one."""
    return f"lmaas:grammar-checker:{model_id}" if model_id else "lmaas:grammar-checker"


decode_verdict = msgspec.json.Decoder(Verdict).decode
decode_question = msgspec.json.Decoder(Question).decode
decode_prompt = msgspec.json.Decoder(Prompt).decode
decode_tokens = msgspec.json.Decoder(Tokens).decode
#: The messages that a checker's process receives and sends. It sends a Verdict on a prompt if the prompt's reader has died.
decode_asked = msgspec.json.Decoder(Question | Prompt).decode
decode_told = msgspec.json.Decoder(Verdict | Tokens).decode
encode = msgspec.json.Encoder().encode
