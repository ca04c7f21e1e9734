"""Write docs/reference/parameters.md from the tables.

`python -m lmaas.protocols.parameters.documentation > docs/reference/parameters.md` writes it.
"""

import json
import sys
from dataclasses import dataclass

from lmaas.protocols.messages.table import COUNT_TOKENS, MESSAGES
from lmaas.protocols.parameters.table import CHAT, COMPLETION, Parameter, Table, Treatment
from lmaas.protocols.pooling.embeddings import TABLE as EMBEDDINGS
from lmaas.protocols.pooling.ranking import RERANK, SCORE
from lmaas.protocols.responses.parameters import TABLE as RESPONSES
from lmaas.protocols.tokens.counts import INPUT_TOKENS
from lmaas.protocols.tokens.tokenize import DETOKENIZE, TOKENIZE

_INTRODUCTION = """\
# Request parameters

<!-- Generated from the protocols' tables by `python -m lmaas.protocols.parameters.documentation`. Do not edit. -->

This page lists the parameters of each protocol: those of its inventor, and those of vLLM that are safe to forward. `null` always means
that a parameter was not given. A parameter that is not in the lists of its endpoint is refused with 400 `unsupported_parameter`; unknown
fields inside a message, a tool or another parameter have no effect, except in `chat_template_kwargs`. Every request has `model`: a base
model, an adapter, or a version of one as `name@version`.

A parameter has one of three treatments:

- **Used**: it is checked, and then sent to the engine or applied by the service. A value that is not allowed is answered with 400
  `invalid_type` or `out_of_range`, with its name in `param`.
- **Accepted without effect**: it changes nothing, because the service already does what it asks for or because it only hints.
- **Refused**: it is answered with 400 `unsupported_parameter`, because without its effect the answer would be another one than the client
  expects, or because it endangers other tenants. Values that ask for nothing are accepted.
"""
_LISTS = {
    Treatment.FORWARDED: ("Used", "allowed"),
    Treatment.ACCEPTED: ("Accepted without effect", "why"),
    Treatment.REFUSED: ("Refused", "why"),
}
_NOTES = """\
### Messages

- Roles: `system`, `developer`, `user`, `assistant`, `tool`, and the deprecated `function`. Content is a string or a list of text parts
  (`text`, `input_text`, `output_text`, `refusal`, `thinking`). Images, sounds and files are answered with 400 `unsupported_content`, and
  nothing is ever fetched.
- An answer's message can be sent back as it came, with `annotations`, `audio`, `function_call`, `refusal`, `reasoning` and what a client's
  library adds to it.
- Arguments of an earlier tool call that are not a JSON object reach the model as `{"invalid_arguments": "<the text>"}`, so a broken call
  never stops a conversation.
- Half a surrogate pair (a cut emoji) in `messages` or `prompt` becomes U+FFFD. Elsewhere it is answered with 400 `invalid_string`.

### Tools

- With `tool_choice` `required` or a function, the arguments are constrained to the tool's schema, as with `strict`. With `auto` they are
  constrained only for tools that are `strict`. What the engine's grammar library cannot enforce, such as a pattern with `\\b`, is left
  out of the schema of a tool that is not `strict`, and refused with 400 `invalid_schema` for one that is. If a schema cannot be enforced
  all the same, tools that are not `strict` are passed on as they were sent, and their arguments are free.
- `allowed_tools` leaves only the named tools in the request.
- With the deprecated `functions`, the answer has `function_call` instead of `tool_calls`, and the finish reason `function_call`.

### Answers

- `service_tier` is the tier that was used, in plain answers and in every event of a stream.
- `system_fingerprint` changes when the base model's configuration, the adapter's weights or the release of the service change.
- One answer has at most 1,000,000 log probabilities, counting alternatives; a stream of sampled tokens has no such limit.
- With `n` above 1 and temperature 0, all choices are the same.
- With `echo` and `max_tokens` 0 the usage shows no completion tokens. The engine still generates one, which is metered.
- `max_tokens` or `max_completion_tokens` above the model's context is `out_of_range`; a prompt that is too long is
  `context_length_exceeded`.
"""
_POOLING_NOTES = """\
[Embeddings](embeddings.md) describes inputs, truncation, base64, dimensions, scores and usage.
"""
_MESSAGES_NOTES = """\
[Messages](messages.md) describes blocks, thinking, streams, usage and errors.
"""
_RESPONSES_NOTES = """\
[Responses](responses.md) describes the items, the events and what is stored.
"""
_TOKENS_NOTES = """\
[Tokens](tokens.md) describes the answers, and how tokens are counted.
"""


@dataclass(frozen=True, slots=True)
class Group:
    """A section of the page: endpoints that share most of their parameters, and notes in Markdown."""

    title: str
    tables: tuple[Table, ...]
    notes: str = ""


#: The sections of the page.
GROUPS = (
    Group("Chat completions and completions", (CHAT, COMPLETION), _NOTES),
    Group("Embeddings, rankings and scores", (EMBEDDINGS, RERANK, SCORE), _POOLING_NOTES),
    Group("Responses", (RESPONSES, INPUT_TOKENS), _RESPONSES_NOTES),
    Group("Messages", (MESSAGES, COUNT_TOKENS), _MESSAGES_NOTES),
    Group("Tokens", (TOKENIZE, DETOKENIZE), _TOKENS_NOTES),
)
#: The tables of all protocols.
TABLES = tuple(table for group in GROUPS for table in group.tables)


def page() -> str:
    """Return the page in Markdown."""
    return "\n".join([_INTRODUCTION, *(_section(group) for group in GROUPS)])


def _section(group: Group) -> str:
    paths = " and ".join(f"`POST {table.path}`" for table in group.tables)
    parts = [f"## {group.title}\n", f"{paths}\n"]
    for treatment, (title, column) in _LISTS.items():
        # A row that several tables share is one object.
        rows = {id(item): item for table in group.tables for item in table.parameters if item.treatment is treatment}
        if not rows:
            continue
        several = len(group.tables) > 1
        heads = ["parameter", *(["endpoints"] if several else []), column]
        lines = [f"### {title}\n", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
        lines += [f"| {' | '.join(_cells(item, group.tables))} |" for item in rows.values()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join([*parts, *([group.notes] if group.notes else [])])


def _cells(item: Parameter, tables: tuple[Table, ...]) -> list[str]:
    where = [table.name for table in tables if any(other is item for other in table.parameters)]
    named = "both" if len(where) == len(tables) == 2 else "all" if len(where) == len(tables) else ", ".join(where)
    neutral = f" (accepted: {', '.join(f'`{json.dumps(value)}`' for value in item.neutral)})" if item.neutral else ""
    return [f"`{item.name}`", *([named] if len(tables) > 1 else []), f"{item.rule}{neutral}"]


if __name__ == "__main__":
    sys.stdout.write(page())
