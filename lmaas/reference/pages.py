"""The HTML of the reference, and its routes. Each page is rendered at its first request and kept."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from lmaas.errors import NotFound
from lmaas.reference.resources import Resource, resources

_STYLE = Path(__file__).parent / "static" / "style.css"
#: Nothing but the style sheet is loaded, and nothing runs.
_HEADERS = {
    "cache-control": "public, max-age=300",
    "content-security-policy": "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class _Kept:
    content: bytes
    tag: str


class Reference:
    """The pages of an OpenAPI document. There are as many as the document has resources, and the table of their contents."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._spec = spec
        self._kept: dict[str, _Kept] = {}
        self._environment = Environment(
            loader=PackageLoader("lmaas.reference"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )

    def routes(self) -> list[BaseRoute]:
        """Return the routes, which need no key."""
        return [
            Route("/docs", self._index),
            Route("/docs/style.css", self._style),
            Route("/docs/{slug}", self._resource),
        ]

    def index(self) -> str:
        """Return the page that lists all operations."""
        return self._environment.get_template("index.html").render(resources=self._resources(), slug="")

    def resource(self, slug: str) -> str:
        """Return the page of a resource. Raises NotFound if there is none."""
        found = self._resources()
        resource = next((each for each in found if each.slug == slug), None)
        if resource is None:
            raise NotFound("Not found. The pages of the API reference are listed at /docs.", code="not_found")
        return self._environment.get_template("resource.html").render(resources=found, slug=slug, resource=resource)

    def _resources(self) -> list[Resource]:
        return resources(self._spec)

    async def _index(self, request: Request) -> Response:
        return await self._serve(request, "", self.index, "text/html")

    async def _style(self, request: Request) -> Response:
        return await self._serve(request, "style.css", _STYLE.read_text, "text/css")

    async def _resource(self, request: Request) -> Response:
        slug = request.path_params["slug"]
        return await self._serve(request, slug, lambda: self.resource(slug), "text/html")

    async def _serve(self, request: Request, name: str, render: Callable[[], str], media: str) -> Response:
        kept = self._kept.get(name)
        if kept is None:
            # In a thread, because a page takes tens of milliseconds, in which streams would wait.
            content = (await asyncio.to_thread(render)).encode()
            kept = self._kept[name] = _Kept(content, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
        headers = _HEADERS | {"etag": kept.tag}
        if kept.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(kept.content, headers=headers, media_type=media)
