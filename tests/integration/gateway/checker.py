"""A stand-in for the host that checks grammars. The test sets its verdicts."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lmaas.engine.grammars.verdict import Prompt, Question, Tokens, Verdict, decode_prompt, decode_question, encode
from lmaas.private_server import serve_privately
from tests.support.conditions import until
from tests.support.processes import free_port


def name_of(question: Question) -> str:
    """Return the name of the schema in the question."""
    form: Any = question.parameters.get("response_format")
    return str(form["json_schema"]["name"]) if form else "tools"


class Checker:
    """A checker with the test's verdicts: `verdicts` by the schema's name. Every other schema passes. `read` reads prompts."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[str] = []
        self.models: list[str] = []
        self.verdicts: dict[str, Verdict] = {}
        self.judge: Callable[[Question], Verdict] = lambda question: self.verdicts.get(name_of(question), Verdict(cpu_s=0.05))
        self.prompts: list[Prompt] = []
        self.read: Callable[[Prompt], Tokens] = lambda _: Tokens(count=1)
        self.status = 200
        self.open = asyncio.Event()
        self.open.set()

    async def check(self, request: Request) -> Response:
        """Respond to one question."""
        question = decode_question(await request.body())
        self.asked.append(name_of(question))
        self.models.append(request.query_params["model"])
        await self.open.wait()
        return Response(encode(self.judge(question)), self.status)

    async def tokens(self, request: Request) -> Response:
        """Read one prompt."""
        prompt = decode_prompt(await request.body())
        self.prompts.append(prompt)
        await self.open.wait()
        return Response(encode(self.read(prompt)), self.status)


@asynccontextmanager
async def serving() -> AsyncIterator[Checker]:
    """Serve a checker on a free port for the block."""
    port = free_port()
    checker = Checker(f"http://127.0.0.1:{port}")
    routes = [Route("/check", checker.check, methods=["POST"]), Route("/tokens", checker.tokens, methods=["POST"])]
    app = Starlette(routes=routes)
    task = asyncio.create_task(serve_privately(app, "127.0.0.1", port))

    async def listens() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    await until(listens, every_s=0.01)
    try:
        yield checker
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
