"""Write docs/parameters.md from the table: `python -m lmaas.protocols.parameters.documentation > docs/parameters.md`."""

import json
import sys

from lmaas.protocols.parameters.table import PARAMETERS, Endpoint, Parameter, Treatment

_INTRODUCTION = """\
# Request parameters

<!-- Generated from lmaas/protocols/parameters/table.py by `python -m lmaas.protocols.parameters.documentation`. Do not edit. -->

`POST /v1/chat/completions` and `POST /v1/completions` take OpenAI's parameters and those of vLLM that are safe to forward. `null` always
means that a parameter was not given. A parameter that is not on this page is refused with 400 `unsupported_parameter`; unknown fields
inside a message, a tool or another parameter have no effect, except in `chat_template_kwargs`.
"""
_SECTIONS = {
    Treatment.FORWARDED: (
        "Forwarded",
        "These are checked and then sent to the engine. A value that is not allowed is answered with 400 "
        "`invalid_type` or `out_of_range`, with its name in `param`.",
        "Allowed",
    ),
    Treatment.ACCEPTED: (
        "Accepted without effect",
        "These change nothing, because the service already does what they ask for or because they only hint.",
        "Why",
    ),
    Treatment.REFUSED: (
        "Refused",
        "These are answered with 400 `unsupported_parameter`, because without their effect the answer would be "
        "another one than the client expects, or because they endanger other tenants. Values that ask for nothing are "
        "accepted.",
        "Why",
    ),
}
_NOTES = """\
## Messages

- Roles: `system`, `developer`, `user`, `assistant`, `tool`, and the deprecated `function`. Content is a string or a list of text parts
  (`text`, `input_text`, `output_text`, `refusal`, `thinking`). Images, sounds and files are answered with 400 `unsupported_content`, and
  nothing is ever fetched.
- An answer's message can be sent back as it came, with `annotations`, `audio`, `function_call`, `refusal`, `reasoning` and what a client's
  library adds to it.
- Arguments of an earlier tool call that are not a JSON object reach the model as `{"invalid_arguments": "<the text>"}`, so a broken call
  never stops a conversation.
- Half a surrogate pair (a cut emoji) in `messages` or `prompt` becomes U+FFFD. Elsewhere it is answered with 400 `invalid_string`.

## Tools

- With `tool_choice` `required` or a function, the arguments are constrained to the tool's schema, as with `strict`. With `auto` they are
  constrained only for tools that are `strict`. What the engine's grammar library cannot enforce, such as a pattern with `\\b`, is left
  out of the schema of a tool that is not `strict`, and refused with 400 `invalid_schema` for one that is. If a schema cannot be enforced
  all the same, tools that are not `strict` are passed on as they were sent, and their arguments are free.
- `allowed_tools` leaves only the named tools in the request.
- With the deprecated `functions`, the answer has `function_call` instead of `tool_calls`, and the finish reason `function_call`.

## Answers

- `service_tier` is the tier that was used, in plain answers and in every event of a stream.
- `system_fingerprint` changes when the base model's configuration, the adapter's weights or the release of the service change.
- One answer has at most 1,000,000 log probabilities, counting alternatives; a stream of sampled tokens has no such limit.
- With `n` above 1 and temperature 0, all choices are the same.
- With `echo` and `max_tokens` 0 the usage shows no completion tokens. The engine still generates one, which is metered.
- `max_tokens` or `max_completion_tokens` above the model's context is `out_of_range`; a prompt that is too long is
  `context_length_exceeded`.
"""


def page() -> str:
    """Return the page in Markdown."""
    parts = [_INTRODUCTION]
    for treatment, (title, text, column) in _SECTIONS.items():
        lines = [f"## {title}\n", f"{text}\n", f"| parameter | endpoints | {column.lower()} |", "| --- | --- | --- |"]
        lines += [_line(item) for item in PARAMETERS if item.treatment is treatment]
        parts.append("\n".join(lines) + "\n")
    return "\n".join([*parts, _NOTES])


def _line(item: Parameter) -> str:
    where = "both" if len(item.endpoints) == len(Endpoint) else item.endpoints[0].value
    neutral = f" (accepted: {', '.join(f'`{json.dumps(value)}`' for value in item.neutral)})" if item.neutral else ""
    return f"| `{item.name}` | {where} | {item.rule}{neutral} |"


if __name__ == "__main__":
    sys.stdout.write(page())
