"""The messages between gateways and grammar checkers, and the limits of a check. Imports nothing of the engine."""

import msgspec

#: CPU time of one check: validation, compilation and the first masks, in seconds.
CPU_S = 2.0
#: CPU time of the validation alone. The engine's server repeats it in its event loop, where every other stream waits for it.
VALIDATION_S = 0.5
#: CPU time of the compilation alone. The engine repeats it once, in a thread that the grammars of all tenants share.
COMPILATION_S = 1.0
#: CPU time of one mask. The engine computes one for each token, between two steps of all its requests.
MASK_S = 0.1
#: Address space that a check may use beyond what it had at its start, in bytes.
MEMORY_BYTES = 512 * 1024 * 1024
#: Wall-clock time of one check. A busy machine needs more than its CPU time; a check that takes longer has no verdict.
WALL_S = 30.0

INVALID = "invalid_schema"
TOO_COMPLEX = "schema_too_complex"
#: There is no verdict. It is not an error of the client, and is not kept.
UNKNOWN = "unknown"


class Verdict(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whether an engine may compile a grammar.

    `code` is empty if it may; otherwise one of INVALID, TOO_COMPLEX and UNKNOWN, with a `message` for the client and the parameter
    of the request that is at fault. `cpu_s` is the CPU time of the check in seconds.
    """

    code: str = ""
    message: str = ""
    param: str = ""
    cpu_s: float = 0.0


class Question(msgspec.Struct, frozen=True):
    """The grammar to check: the endpoint's path (`/v1/chat/completions` or `/v1/completions`), and the parameters of the engine's request
    from which it makes its grammar, by name."""

    path: str
    parameters: dict[str, object]


def key_of(model_id: str = "") -> str:
    """The key in Redis of the URL of the host that checks: for every base model, or for one."""
    return f"lmaas:grammar-checker:{model_id}" if model_id else "lmaas:grammar-checker"


decode_verdict = msgspec.json.Decoder(Verdict).decode
decode_question = msgspec.json.Decoder(Question).decode
encode = msgspec.json.Encoder().encode
