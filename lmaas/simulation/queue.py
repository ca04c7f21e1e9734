"""The scheduler's real functions at the simulated time, in the simulation's own Valkey."""

from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from hiredis import pack_command
from redis import Redis

from lmaas.errors import InternalError
from lmaas.scheduling.client import Scheduler, library

Answer = TypeVar("Answer")
Message = tuple[str, str]

#: The changes to the library: the source of its time, and the destination of its messages.
CHANGES = (
    ("redis.call('TIME')", "redis.call('MGET', 'now:s', 'now:us')"),
    ("redis.call('PUBLISH', ", "redis.call('RPUSH', 'said', "),
)
#: The server's clock at the beginning of every simulation, in ms: a day in 2026.
BEGINNING_MS = 1_767_225_600_000
TAKE_SAID: bytes = pack_command(("LPOP", "said", 1_000_000))  # type: ignore[arg-type]


class Queue(Scheduler):
    """A client of the scheduler whose calls complete before they return, at the time of `now_s`.

    `take_messages` returns the messages published since its last call.
    """

    def __init__(self, redis: Redis, now_s: Callable[[], float]) -> None:
        text = library()
        for real, ours in CHANGES:
            if real not in text:
                raise InternalError from ValueError(f"the scheduler's library has no {real!r} any more")
            text = text.replace(real, ours)
        super().__init__(redis, text)  # type: ignore[arg-type]
        redis.function_load(self._library, replace=True)
        self._connection = redis.connection_pool.get_connection()
        self._now_s = now_s
        self._messages: list[Message] = []

    async def call(self, function: str, pool: str, *args: bytes | str | int) -> Any:
        """Return the server's reply, once `ask_all` has sent the call."""
        return await _Call((f"{self._prefix}_{function}", 1, f"lmaas:{{{pool}}}", *args))

    def ask(self, calling: Coroutine[Any, Any, Answer]) -> Answer:
        """Return the result of one call of the client at the present time."""
        answer: Answer = self.ask_all(calling)[0]
        return answer

    def ask_all(self, *callings: Coroutine[Any, Any, Any]) -> list[Any]:
        """Return the results of these calls, made one after the other at the present time and sent together."""
        now_ms = BEGINNING_MS + round(self._now_s() * 1000)
        pack: Callable[[Any], bytes] = pack_command  # hiredis describes a tuple of one element
        commands = [pack(("MSET", "now:s", now_ms // 1000, "now:us", now_ms % 1000 * 1000))]
        for calling in callings:
            commands += [pack(("FCALL", *calling.send(None))), TAKE_SAID]
        self._connection.send_packed_command([b"".join(commands)])  # type: ignore[no-untyped-call]
        replies = [self._connection.read_response() for _ in commands]
        for said in replies[2::2]:
            if said:
                self._messages += zip(said[::2], said[1::2], strict=True)
        return [_answered(calling, reply) for calling, reply in zip(callings, replies[1::2], strict=True)]

    def take_messages(self) -> list[Message]:
        """Return the channel and the text of each published message, in order."""
        taken, self._messages = self._messages, []
        return taken


class _Call:
    """A call in progress, which returns the command to send and receives the reply."""

    def __init__(self, command: tuple[bytes | str | int, ...]) -> None:
        self._command = command

    def __await__(self) -> Generator[tuple[bytes | str | int, ...], Any, Any]:
        return (yield self._command)


def _answered(calling: Coroutine[Any, Any, Any], reply: Any) -> Any:
    try:
        calling.send(reply)
    except StopIteration as done:
        return done.value
    raise InternalError from RuntimeError("a call of the simulation's queue waits twice")


@contextmanager
def server() -> Iterator[Redis]:
    """Run a Valkey in memory, for one simulation after the other."""
    from lmaas.up.embedded import valkey  # noqa: PLC0415 (a gateway's image has no server)

    with TemporaryDirectory(prefix="lmaas-simulation-") as folder, valkey(Path(folder)) as url:
        client = Redis.from_url(url, decode_responses=True)
        try:
            client.config_set("appendonly", "no")
            yield client
        finally:
            client.close()
