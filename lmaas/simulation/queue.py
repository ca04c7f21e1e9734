"""The scheduler's real functions in a Valkey of the simulation's own, with the time that the simulation says."""

from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from hiredis import pack_command
from redis import Redis

from lmaas.errors import InternalError
from lmaas.scheduling.client import Scheduler, library
from lmaas.up.embedded import valkey

Answer = TypeVar("Answer")
Message = tuple[str, str]

#: What is changed in the library: where its time comes from, and where its messages go.
CHANGES = (
    ("redis.call('TIME')", "redis.call('MGET', 'now:s', 'now:us')"),
    ("redis.call('PUBLISH', ", "redis.call('RPUSH', 'said', "),
)
#: The server's clock at the beginning of every simulation, in ms: some day in 2026.
BEGINNING_MS = 1_767_225_600_000
MESSAGES_AT_ONCE = 1_000_000


class Queue(Scheduler):
    """The scheduler's client, except that a call is answered before it returns, at the time of `now_s`.

    `take_messages` gives what was published since it was called last.
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

    async def _call(self, function: str, pool: str, *args: bytes | str | int) -> Any:
        now_ms = BEGINNING_MS + round(self._now_s() * 1000)
        commands: tuple[tuple[bytes | str | int, ...], ...] = (
            ("MSET", "now:s", now_ms // 1000, "now:us", now_ms % 1000 * 1000),
            ("FCALL", f"{self._prefix}_{function}", 1, f"lmaas:{{{pool}}}", *args),
            ("LPOP", "said", MESSAGES_AT_ONCE),
        )
        pack: Callable[[Any], bytes] = pack_command  # hiredis describes a tuple of one element
        self._connection.send_packed_command([b"".join(map(pack, commands))])  # type: ignore[no-untyped-call]
        _, answer, said = [self._connection.read_response() for _ in commands]
        if said:
            self._messages += zip(said[::2], said[1::2], strict=True)
        return answer

    def take_messages(self) -> list[Message]:
        """Channel and text of what was published, in order."""
        taken, self._messages = self._messages, []
        return taken


def ask(calling: Coroutine[Any, Any, Answer]) -> Answer:
    """What a call of `Queue` answers: it never waits."""
    try:
        calling.send(None)
    except StopIteration as done:
        answer: Answer = done.value
        return answer
    raise InternalError from RuntimeError("a call of the simulation's queue waits")


@contextmanager
def server() -> Iterator[Redis]:
    """A Valkey in memory, for one simulation after the other."""
    with TemporaryDirectory(prefix="lmaas-simulation-") as folder, valkey(Path(folder)) as url:
        client = Redis.from_url(url, decode_responses=True)
        try:
            client.config_set("appendonly", "no")
            yield client
        finally:
            client.close()
