"""Unpacks compressed request bodies piece by piece, so that a few bytes never become many at once."""

import zlib
from collections.abc import Iterator

from lmaas.errors import InvalidRequest, UnsupportedMediaType

#: The most bytes that are unpacked in one step.
PIECE_BYTES = 64 * 1024
#: The most gzip members in one body. Tools that compress in parallel write one for each block.
MAX_MEMBERS = 16_384
#: Content coding → window size for zlib: gzip's format, and the zlib format that HTTP calls deflate.
_WINDOWS = {b"gzip": 16 + zlib.MAX_WBITS, b"x-gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}


class Unpacker:
    """Unpacks one body. Raises InvalidRequest `invalid_content_encoding` for bytes that are damaged or cut."""

    def __init__(self, coding: bytes) -> None:
        """Raises UnsupportedMediaType for a coding other than gzip and deflate."""
        window = _WINDOWS.get(coding)
        if window is None:
            raise UnsupportedMediaType(
                f"The content encoding '{coding[:50].decode('latin-1')}' is not supported. Send the body as it is, or encode it with gzip "
                "or deflate, once.",
                param="Content-Encoding",
            )
        self._coding, self._window = coding.decode(), window
        self._member: zlib._Decompress | None = None
        self._members = 0

    def feed(self, data: bytes, *, last: bool) -> Iterator[bytes]:
        """Unpack these bytes, in pieces of at most PIECE_BYTES. `last` marks the end of the body."""
        while data:
            if self._member is None:
                # Some tools pad a file with zeros.
                data = data.lstrip(b"\0") if self._members else data
                if not data:
                    break
                self._member = self._next_member()
            piece = self._unpack(self._member, data)
            if piece:
                yield piece
            data = self._member.unconsumed_tail
            if self._member.eof:
                data, self._member = self._member.unused_data, None
        if last and self._member is not None:
            # zlib may hold back output when a piece is full.
            while piece := self._unpack(self._member, b""):
                yield piece
            if not self._member.eof:
                raise InvalidRequest(
                    f"The {self._coding} data of the request body ends too early. Send the body again.", code="invalid_content_encoding"
                )

    def _next_member(self) -> "zlib._Decompress":
        self._members += 1
        if self._members > (1 if self._coding == "deflate" else MAX_MEMBERS):
            raise InvalidRequest(
                f"The request body has more {self._coding} members than are allowed. Compress it in one piece.",
                code="invalid_content_encoding",
            )
        return zlib.decompressobj(self._window)

    def _unpack(self, member: "zlib._Decompress", data: bytes) -> bytes:
        try:
            return member.decompress(data, PIECE_BYTES)
        except zlib.error:
            raise InvalidRequest(
                f"The request body is not valid {self._coding} data, although its Content-Encoding header says so.",
                code="invalid_content_encoding",
            ) from None
