"""A relay between a gateway and Valkey that counts the commands.

Valkey's own counters also count the commands inside a function, and do not always distinguish clients of a Unix socket.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

#: Commands that call a function or a script, whose name is the second word.
CALLS = frozenset({"FCALL", "FCALL_RO", "EVALSHA", "EVALSHA_RO"})


class Commands:
    """Finds the commands in a client's bytes, however they are split: RESP arrays of strings."""

    def __init__(self) -> None:
        self._rest = b""

    def __call__(self, data: bytes) -> list[str]:
        """Return the commands that `data` completes, by name, and `FCALL name` for a call. Raises ValueError for anything but commands."""
        self._rest += data
        names = []
        while (found := self._first()) is not None:
            words, end = found
            self._rest = self._rest[end:]
            name = words[0].decode().upper()
            names.append(f"{name} {words[1].decode()}" if name in CALLS else name)
        return names

    def _first(self) -> tuple[list[bytes], int] | None:
        line = self._rest.find(b"\r\n")
        if line < 0:
            return None
        if self._rest[:1] != b"*":
            raise ValueError(f"not a command: {self._rest[:100]!r}")
        words: list[bytes] = []
        at = line + 2
        for _ in range(int(self._rest[1:line])):
            line = self._rest.find(b"\r\n", at)
            if line < 0:
                return None
            size = int(self._rest[at + 1 : line])
            at = line + 2 + size + 2
            if len(self._rest) < at:
                return None
            words.append(self._rest[line + 2 : at - 2])
        return words, at


@asynccontextmanager
async def counted(socket: Path, valkey: Path) -> AsyncIterator[Counter[str]]:
    """Listen on `socket` in front of Valkey's own socket, and yield the number of times that each command was sent."""
    counts: Counter[str] = Counter()
    relays: set[asyncio.Task[None]] = set()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(str(valkey))
        with contextlib.closing(writer), contextlib.closing(server_writer):
            commands = Commands()

            async def ask() -> None:
                while data := await reader.read(2**16):
                    counts.update(commands(data))
                    server_writer.write(data)
                server_writer.write_eof()

            async def answer() -> None:
                while data := await server_reader.read(2**16):
                    writer.write(data)

            async with asyncio.TaskGroup() as group:
                group.create_task(ask())
                group.create_task(answer())

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # An explicit task, because asyncio's own logs an error for each connection that is still open at the end.
        relays.add(asyncio.create_task(relay(reader, writer)))

    async with await asyncio.start_unix_server(accept, str(socket)):
        try:
            yield counts
        finally:
            for task in relays:
                task.cancel()
            await asyncio.gather(*relays, return_exceptions=True)
