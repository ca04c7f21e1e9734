"""The inputs of a request for embeddings, and the parameters that all protocols of pooling engines share."""

from typing import Any

from lmaas.admission.tiers import SERVICE_TIERS
from lmaas.errors import InvalidRequest
from lmaas.protocols.parameters.checks import integer, one_of, service_tier, wrong_type
from lmaas.protocols.parameters.table import MAX_TOKENS, accepted, forwarded, refused
from lmaas.protocols.pooling.requests import MAX_INPUTS

_FORMS = "a string, a list of strings, a list of token ids, or a list of such lists"
_OURS = "the service decides it"
MEDIA = "the models here read text only"


def read_input(name: str, value: Any) -> Any:
    """Return the inputs as a list. Raises InvalidRequest if there are none, too many, or an empty one."""
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int)):
        value = [value]
    if not isinstance(value, list):
        raise wrong_type(name, _FORMS)
    check_count(name, len(value))
    for one in value:
        if isinstance(one, list):
            # `type` and not `isinstance`, because true and false are numbers in Python.
            if not all(type(token) is int and 0 <= token < 2**31 for token in one):
                raise wrong_type(name, _FORMS)
        elif not isinstance(one, str):
            raise wrong_type(name, _FORMS)
        if not one:
            raise InvalidRequest(
                f"'{name}' must not contain an empty string or an empty list. Leave it out.", code="empty_input", param=name
            )
    if any(type(one) is not type(value[0]) for one in value):
        raise wrong_type(name, _FORMS)
    return value


def check_count(name: str, count: int) -> None:
    """Raise InvalidRequest if a request has no inputs or too many."""
    if count == 0:
        raise InvalidRequest(f"'{name}' must not be empty. Send at least one.", code="empty_input", param=name)
    if count > MAX_INPUTS:
        raise InvalidRequest(
            f"'{name}' has {count:,} entries; at most {MAX_INPUTS:,} are allowed. Send the others in another request.",
            code="too_many_inputs",
            param=name,
        )


TRUNCATION = (
    forwarded(
        "truncate_prompt_tokens",
        "-1 (to the context), or 1 up to the context; without it, a longer input is an error",
        integer(-1, MAX_TOKENS),
    ),
    forwarded("truncation_side", "right (the default: keeps the beginning) or left; needs truncate_prompt_tokens", one_of("left", "right")),
)
#: The rows that all protocols of this folder share.
COMMON = (
    *TRUNCATION,
    forwarded("service_tier", f"{', '.join(SERVICE_TIERS)}", service_tier),
    accepted("user", "for the client's own use"),
    accepted("safety_identifier", "for the client's own use"),
    accepted("metadata", "for the client's own use"),
    refused("normalize", "its name is use_activation", True),
    refused("padding", "inputs are not padded", "do_not_pad"),
    refused("priority", "it is the service's; use service_tier", 0),
    refused("request_id", "the service makes the id, which the answer has in x-request-id"),
    refused("cache_salt", _OURS),
    refused("mm_processor_kwargs", MEDIA, {}),
    refused("chat_template_kwargs", "inputs are plain text", {}),
    refused("stream", "the answer comes in one piece", False),
)
