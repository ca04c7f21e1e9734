"""The stylesheet, the scripts and the icon of the console: read once, compressed once, and cached by browsers for as long as they stay
the same."""

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "static"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
_YEAR = "public, max-age=31536000, immutable"
#: For an address without the hash of the file, which may have changed since.
_ASK_AGAIN = "no-cache"


@dataclass(frozen=True, slots=True)
class Asset:
    """A file, plain and compressed. `tag` is the beginning of its hash."""

    media: str
    tag: str
    plain: bytes
    packed: bytes


class Assets:
    """All files of the folder `static` in memory."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._assets = {path.relative_to(FOLDER).as_posix(): _read(path) for path in sorted(FOLDER.rglob("*")) if path.suffix in _TYPES}

    def url(self, name: str) -> str:
        """Return the address of a file with its hash. Raises KeyError if there is no such file."""
        return f"{self._prefix}/{name}?v={self._assets[name].tag}"

    @property
    def route(self) -> Route:
        """The route of all files. They need no sign-in."""
        return Route(f"{self._prefix}/{{name:path}}", self._serve)

    async def _serve(self, request: Request) -> Response:
        asset = self._assets.get(request.path_params["name"])
        if asset is None:
            return PlainTextResponse("Not found.", status_code=404)
        fresh = request.query_params.get("v") == asset.tag
        headers = {"etag": f'"{asset.tag}"', "cache-control": _YEAR if fresh else _ASK_AGAIN, "vary": "Accept-Encoding"}
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        if _takes_gzip(request.headers.get("accept-encoding", "")):
            return Response(asset.packed, media_type=asset.media, headers=headers | {"content-encoding": "gzip"})
        return Response(asset.plain, media_type=asset.media, headers=headers)


def _read(path: Path) -> Asset:
    plain = path.read_bytes()
    return Asset(_TYPES[path.suffix], hashlib.sha256(plain).hexdigest()[:16], plain, gzip.compress(plain, 9, mtime=0))


def _takes_gzip(accepted: str) -> bool:
    for coding in accepted.split(","):
        name, _, weight = coding.partition(";")
        if name.strip().lower() == "gzip":
            return weight.replace(" ", "").lower() not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
