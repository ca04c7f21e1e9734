"""A connection to Redis that pipelines: calls that are made at the same time are sent together, because the client library costs more than
the server."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from hiredis import ProtocolError, PushNotification, Reader, pack_command
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeout

#: The maximum number of commands that are sent together, which limits the time that a call waits for earlier ones.
MAX_COMMANDS = 128
#: The time that the server may take to reply to all of them on one connection, and the time that all attempts may take together.
ANSWER_S = 3.0
GIVE_UP_S = 5.0
#: The pauses before each attempt. Each attempt except the first uses a new connection.
PAUSES_S = (0.0, 0.05, 0.2)
#: Errors of a server that may not occur on another connection.
NOT_NOW = ("LOADING ", "NOAUTH ", "WRONGPASS ")

Command = tuple[bytes | str | int, ...]
#: A packed command and the future that gets its reply.
PendingCommand = tuple[bytes, "asyncio.Future[Any]"]
#: Called when an exchange ends, with None or with the error that ended it.
OnEnd = Callable[[RedisError | None], None]


class PipelinedConnection:
    """Sends commands on one connection, without a transaction.

    A single command is sent immediately. Commands that arrive while others are being sent are sent together after them. Each command gets
    its own reply or error, and cancelling one does not affect the others. Commands whose reply was lost with the connection are sent again,
    so they must be safe to repeat.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._unsent: deque[PendingCommand] = deque()
        #: Commands that have been sent, or are about to be, and have no reply yet.
        self._sent: deque[PendingCommand] = deque()
        self._sending: asyncio.Handle | asyncio.Task[None] | None = None
        self._connection: AbstractConnection | None = None
        self._line: _Line | None = None

    @property
    def unsent(self) -> int:
        """The number of commands that wait to be sent."""
        return len(self._unsent)

    @property
    def under_way(self) -> bool:
        """True while commands are being sent, or have no reply yet."""
        return self._sending is not None

    @property
    def connected(self) -> bool:
        """True while the connection is open."""
        return self._line is not None and self._line.open

    def send(self, *command: bytes | str | int) -> "asyncio.Future[Any]":
        """Send a command, whether or not its caller waits. The future gets the reply, or a redis.exceptions.RedisError."""
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Any] = loop.create_future()
        # Packed here, so that a command that cannot be packed fails in its own caller.
        self._unsent.append((_pack(command), reply))
        if self._sending is None:
            # Commands of the same turn of the loop go out together with this one.
            self._sending = loop.call_soon(self._send)
        return reply

    def _send(self) -> None:
        """Send the waiting commands, if there are any. While the connection works, no task is used, because a task would cost more than the
        work."""
        unsent = self._unsent
        while unsent and len(self._sent) < MAX_COMMANDS:
            each = unsent.popleft()
            if not each[1].done():
                self._sent.append(each)  # a command that was cancelled before it was sent is left out
        if not self._sent:
            self._sending = None
        elif self._line is not None and self._line.open:
            self._line.exchange(self._sent, self._exchanged)
        else:
            self._try_again(None)

    def _exchanged(self, lost: RedisError | None) -> None:
        if lost is None:
            self._send()
        else:
            self._try_again(lost)

    def _try_again(self, lost: RedisError | None) -> None:
        self._sending = asyncio.create_task(self._exchange(lost), name="redis-pipelining")
        self._sending.add_done_callback(self._tried)

    def _tried(self, attempts: "asyncio.Task[None]") -> None:
        error = None if attempts.cancelled() else attempts.exception()
        if error is not None or attempts.cancelled():
            # Later commands fail too, because they would wait as long for the same server. The task is cancelled only when the process
            # ends, and even then no caller may wait forever.
            for _, reply in (*self._sent, *self._unsent):
                if error is None:
                    reply.cancel()
                elif not reply.done():
                    reply.set_exception(error)
            self._sent.clear()
            self._unsent.clear()
        self._send()

    async def _exchange(self, lost: RedisError | None) -> None:
        """Send again on new connections, after the one before was `lost`. Raises RedisError if commands are left without a reply."""
        loop = asyncio.get_running_loop()
        began = self._line.began if lost is not None and self._line is not None else loop.time()
        deadline = began + GIVE_UP_S
        for pause_s in PAUSES_S[1:] if lost is not None else PAUSES_S:
            if pause_s:
                await asyncio.sleep(pause_s)
            self._leave_out_cancelled()
            if not self._sent:
                return
            line = await self._connected(deadline)
            ended: asyncio.Queue[RedisError | None] = asyncio.Queue()
            answered = False
            try:
                async with asyncio.timeout_at(_soon(deadline)):
                    line.exchange(self._sent, ended.put_nowait)
                    lost = await ended.get()
                answered = lost is None
            except TimeoutError:
                lost = _late()
            finally:
                if not answered:
                    line.close()  # so that no late reply is given to another command
            if answered:
                return
        if self._sent:
            raise lost or RedisTimeout("the command was not sent")

    def _leave_out_cancelled(self) -> None:
        # The line holds this deque object, so it must not be replaced.
        wanted = [each for each in self._sent if not each[1].done()]
        self._sent.clear()
        self._sent.extend(wanted)

    async def _connected(self, deadline: float) -> "_Line":
        """Return a new connection by `deadline` (the loop's time). Raises RedisError if the library has tried repeatedly without
        success."""
        try:
            # Without this timeout, the library tries to connect for much longer, including the first time.
            async with asyncio.timeout_at(_soon(deadline)):
                first = self._connection is None
                if self._connection is None:
                    # The connection belongs to the library's connection pool, which closes it at the end.
                    self._connection = await self._redis.connection_pool.get_connection()  # type: ignore[no-untyped-call]
                if not first or _is_cut_off(self._connection):
                    await self._connection.disconnect(nowait=True)
                    await self._connection.connect()
        except TimeoutError:
            raise RedisTimeout("there was no connection in time") from None
        self._line = _Line(self._connection)
        return self._line


class _Line(asyncio.Protocol):
    """A connection opened by the library, which handles addresses, passwords and TLS. This class reads the replies, because the library's
    way of reading each one costs too much."""

    def __init__(self, connection: AbstractConnection) -> None:
        writer = connection._writer  # the library has no public access to its socket
        if writer is None:
            raise RedisConnectionError("the connection was lost")
        self._loop = asyncio.get_running_loop()
        self._transport = writer.transport
        self._before = self._transport.get_protocol()
        self._reader = Reader(protocolError=ProtocolError, replyError=ResponseError, encoding="utf-8", notEnoughData=_NOTHING)
        self._sent: deque[PendingCommand] = deque()
        self._on_end: OnEnd | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self.began = 0.0
        self.open = not self._transport.is_closing()
        self._transport.set_protocol(self)

    def exchange(self, commands: deque[PendingCommand], on_end: OnEnd) -> None:
        """Send commands. Each is removed from the deque when its reply arrives. `on_end` is called once, unless the line is closed
        before."""
        self._sent, self._on_end, self.began = commands, on_end, self._loop.time()
        if not self.open:
            self._break(RedisConnectionError("the connection was lost"))
            return
        if self._alarm is None:
            self._alarm = self._loop.call_later(ANSWER_S, self._check_time)
        self._transport.write(b"".join([packed for packed, _ in commands]))

    def close(self) -> None:
        """Close the connection without calling `on_end`."""
        self.open, self._on_end = False, None
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Pass each reply to its command."""
        try:
            self._reader.feed(data)
            while (answer := self._reader.gets()) is not _NOTHING:
                if isinstance(answer, PushNotification):
                    continue
                if not self._sent:
                    self._break(RedisConnectionError("a reply came without a command"))
                    return
                if isinstance(answer, ResponseError) and str(answer).startswith(NOT_NOW):
                    self._break(RedisConnectionError(str(answer)))
                    return
                _, reply = self._sent.popleft()
                if reply.done():
                    continue  # its caller was cancelled
                if isinstance(answer, ResponseError):
                    reply.set_exception(answer)
                else:
                    reply.set_result(answer)
        except (ProtocolError, UnicodeDecodeError) as error:
            self._break(RedisConnectionError(str(error)))
            return
        if not self._sent and self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end(None)

    def connection_lost(self, error: Exception | None) -> None:
        """End the exchange: the server or `close` has closed the connection."""
        self._before.connection_lost(error)
        self._break(RedisConnectionError(str(error or "the connection was lost")))

    def _check_time(self) -> None:
        """End an exchange that takes too long. One timer serves all exchanges, because a timer for each would cost more."""
        self._alarm = None
        if self.open and self._on_end is not None:
            left = self.began + ANSWER_S - self._loop.time()
            if left > 0:
                self._alarm = self._loop.call_later(left, self._check_time)
            else:
                self._break(_late())

    def _break(self, error: RedisError) -> None:
        on_end = self._on_end
        self.close()
        if on_end is not None:
            on_end(error if self._sent else None)


def _is_cut_off(connection: AbstractConnection) -> bool:
    """Return whether a connection from the library's connection pool is dead, which the library does not report."""
    return connection._reader is None or connection._reader.at_eof()


#: The value that a reader returns when no reply is complete.
_NOTHING = object()


def _late() -> RedisTimeout:
    return RedisTimeout(f"Redis did not reply within {ANSWER_S:.0f} s")


def _soon(deadline: float) -> float:
    return min(asyncio.get_running_loop().time() + ANSWER_S, deadline)


def _pack(command: Command) -> bytes:
    pack: Callable[[Any], bytes] = pack_command  # hiredis describes a tuple of one element
    return pack(command)
