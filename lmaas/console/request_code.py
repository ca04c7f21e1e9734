"""A request of the playground: its body, and the same as code to copy."""

import json
import shlex
from pprint import pformat
from typing import Any

from msgspec import Struct

#: Stands for the key, which the console does not show.
KEY = "LMAAS_API_KEY"


class Asked(Struct, frozen=True, forbid_unknown_fields=True):
    """The values of a playground form for one model. None: the service's default."""

    model: str
    message: str
    system: str = ""
    max_tokens: int | None = None
    temperature: float | None = None


def request_body(asked: Asked) -> dict[str, Any]:
    """Return the body of the request, without `stream`."""
    system = [{"role": "system", "content": asked.system}] if asked.system else []
    body: dict[str, Any] = {"model": asked.model, "messages": [*system, {"role": "user", "content": asked.message}]}
    if asked.max_tokens is not None:
        body["max_tokens"] = asked.max_tokens
    if asked.temperature is not None:
        body["temperature"] = asked.temperature
    return body


def code_for(asked: Asked, origin: str) -> list[tuple[str, str]]:
    """Return the request as code, with the name of each language. `origin` is the address of the service."""
    body = request_body(asked) | {"stream": True}
    return [("curl", _curl(body, origin)), ("Python", _python(body, origin)), ("JavaScript", _javascript(body, origin))]


def _curl(body: dict[str, Any], origin: str) -> str:
    return (
        f"curl --no-buffer {shlex.quote(f'{origin}/v1/chat/completions')} \\\n"
        f'  --header "authorization: Bearer ${KEY}" \\\n'
        f"  --header 'content-type: application/json' \\\n"
        f"  --data {shlex.quote(json.dumps(body, indent=2, ensure_ascii=False))}\n"
    )


def _python(body: dict[str, Any], origin: str) -> str:
    arguments = "".join(f"    {name}={_indented(pformat(value, width=100, sort_dicts=False))},\n" for name, value in body.items())
    return (
        "import os\n"
        "\n"
        "from openai import OpenAI\n"
        "\n"
        f"client = OpenAI(base_url={f'{origin}/v1'!r}, api_key=os.environ[{KEY!r}])\n"
        f"stream = client.chat.completions.create(\n{arguments})\n"
        "for chunk in stream:\n"
        "    for choice in chunk.choices:\n"
        '        print(choice.delta.content or "", end="", flush=True)\n'
    )


def _javascript(body: dict[str, Any], origin: str) -> str:
    # JSON is JavaScript, except that a script of a page must not have the end of a script in it.
    request = json.dumps(body, indent=2, ensure_ascii=False).replace("</", "<\\/")
    return (
        'import OpenAI from "openai";\n'
        "\n"
        f"const client = new OpenAI({{ baseURL: {json.dumps(f'{origin}/v1')}, apiKey: process.env.{KEY} }});\n"
        f"const stream = await client.chat.completions.create({request});\n"
        "for await (const chunk of stream) {\n"
        '  process.stdout.write(chunk.choices[0]?.delta?.content ?? "");\n'
        "}\n"
    )


def _indented(text: str) -> str:
    return text.replace("\n", "\n    ")
