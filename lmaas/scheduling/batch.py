"""Calls to Redis that wait at the same moment, sent together: the client library costs more than the server."""

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

#: A bound for what is sent at once, and so for how long a call waits for those before it.
MAX_BATCH = 128
#: How long the server may take to answer all of it, on one connection; and how long that is tried in all: clients wait for it.
ANSWER_S = 3.0
GIVE_UP_S = 5.0
#: How long to wait before each attempt. Each but the first is on a new connection.
PAUSES_S = (0.0, 0.05, 0.2)
#: Errors of a server that another connection may not meet.
NOT_NOW = ("LOADING ", "NOAUTH ", "WRONGPASS ")

Command = tuple[bytes | str | int, ...]
Waiting = tuple[bytes, "asyncio.Future[Any]"]
#: Hears of the end of an exchange: nothing, or why it broke off.
Ended = Callable[[RedisError | None], None]


class Batch:
    """Sends commands on one connection, without a transaction: what is asked for while some are under way goes out after them, together.

    A lone command goes out at once. Each is answered by its own reply or error, and nobody's cancellation reaches the others. Commands
    whose reply was lost with the connection are sent again: they must bear it.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: deque[Waiting] = deque()
        #: What has been sent, or is about to be, and not answered yet.
        self._batch: deque[Waiting] = deque()
        self._sending: asyncio.Handle | asyncio.Task[None] | None = None
        self._connection: AbstractConnection | None = None
        self._line: _Line | None = None

    @property
    def unsent(self) -> int:
        """The number of commands that wait for those under way."""
        return len(self._waiting)

    @property
    def under_way(self) -> int:
        """The number of commands that are being sent and have no reply yet."""
        return len(self._batch)

    @property
    def connected(self) -> bool:
        """Whether the connection of the last exchange still stands."""
        return self._line is not None and self._line.open

    def send(self, *command: bytes | str | int) -> "asyncio.Future[Any]":
        """Have a command go out, whether or not somebody waits; the future gets the reply, or a redis.exceptions.RedisError."""
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Any] = loop.create_future()
        # Packed here: what cannot be packed is its caller's own error.
        self._waiting.append((_pack(command), reply))
        if self._sending is None:
            # Whoever asks at this moment comes along.
            self._sending = loop.call_soon(self._send)
        return reply

    def _send(self) -> None:
        """The next batch, if there is one. While all is well there is no task: that would cost more than what it does."""
        waiting = self._waiting
        while waiting and len(self._batch) < MAX_BATCH:
            each = waiting.popleft()
            if not each[1].done():
                self._batch.append(each)  # who was cancelled before it was sent wants nothing any more
        if not self._batch:
            self._sending = None
        elif self._line is not None and self.connected:
            self._line.exchange(self._batch, self._sent)
        else:
            self._try_again(None)

    def _sent(self, lost: RedisError | None) -> None:
        if lost is None:
            self._send()
        else:
            self._try_again(lost)

    def _try_again(self, lost: RedisError | None) -> None:
        self._sending = asyncio.create_task(self._exchange(lost), name="redis-batch")
        self._sending.add_done_callback(self._tried)

    def _tried(self, attempts: "asyncio.Task[None]") -> None:
        error = None if attempts.cancelled() else attempts.exception()
        if error is not None or attempts.cancelled():
            # Those behind too: they would wait as long for the same server. Cancelled is the end of the process: nobody must wait for ever.
            for _, reply in (*self._batch, *self._waiting):
                if error is None:
                    reply.cancel()
                elif not reply.done():
                    reply.set_exception(error)
            self._batch.clear()
            self._waiting.clear()
        self._send()

    async def _exchange(self, lost: RedisError | None) -> None:
        """Have the batch answered on new connections, after it was `lost` on the one before. Raises RedisError for what is left of it."""
        loop = asyncio.get_running_loop()
        began = self._line.began if lost is not None and self._line is not None else loop.time()
        deadline = began + GIVE_UP_S
        for pause_s in PAUSES_S[1:] if lost is not None else PAUSES_S:
            if pause_s:
                await asyncio.sleep(pause_s)
            self._leave_out_the_gone()
            if not self._batch:
                return
            line = await self._connected(deadline)
            ended: asyncio.Queue[RedisError | None] = asyncio.Queue()
            answered = False
            try:
                async with asyncio.timeout_at(_soon(deadline)):
                    line.exchange(self._batch, ended.put_nowait)
                    lost = await ended.get()
                answered = lost is None
            except TimeoutError:
                lost = _late()
            finally:
                if not answered:
                    line.close()  # no late reply is taken for another's
            if answered:
                return
        if self._batch:
            raise lost or RedisTimeout("not sent")

    def _leave_out_the_gone(self) -> None:
        """Who was cancelled before it was sent wants nothing any more. (The line has this very batch: it stays the same object.)"""
        wanted = [each for each in self._batch if not each[1].done()]
        self._batch.clear()
        self._batch.extend(wanted)

    async def _connected(self, deadline: float) -> "_Line":
        """A new connection, by the loop's time. Raises RedisError if there is none to be had, which has been tried more than once then."""
        try:
            # The library tries to connect for much longer by itself, the first time as well.
            async with asyncio.timeout_at(_soon(deadline)):
                first = self._connection is None
                if self._connection is None:
                    # The pool's, which closes it at the end.
                    self._connection = await self._redis.connection_pool.get_connection()  # type: ignore[no-untyped-call]
                if not first or _is_cut_off(self._connection):
                    await self._connection.disconnect(nowait=True)
                    await self._connection.connect()
        except TimeoutError:
            raise RedisTimeout("no connection in time") from None
        self._line = _Line(self._connection)
        return self._line


class _Line(asyncio.Protocol):
    """A connection that the library has opened, which knows addresses, passwords and TLS. Reading each reply as it does costs too much."""

    def __init__(self, connection: AbstractConnection) -> None:
        writer = connection._writer  # the library gives its socket to nobody
        if writer is None:
            raise RedisConnectionError("the connection was lost")
        self._loop = asyncio.get_running_loop()
        self._transport = writer.transport
        self._before = self._transport.get_protocol()
        self._reader = Reader(protocolError=ProtocolError, replyError=ResponseError, encoding="utf-8", notEnoughData=_NOTHING)
        self._batch: deque[Waiting] = deque()
        self._ended: Ended | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self.began = 0.0
        self.open = not self._transport.is_closing()
        self._transport.set_protocol(self)

    def exchange(self, batch: deque[Waiting], ended: Ended) -> None:
        """Send a batch. Whoever is answered is taken out of it; `ended` is called once, unless the line is closed before."""
        self._batch, self._ended, self.began = batch, ended, self._loop.time()
        if not self.open:
            self._break(RedisConnectionError("the connection was lost"))
            return
        if self._alarm is None:
            self._alarm = self._loop.call_later(ANSWER_S, self._look)
        self._transport.write(b"".join([packed for packed, _ in batch]))

    def close(self) -> None:
        """Cut it: nobody hears of it any more."""
        self.open, self._ended = False, None
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Give each reply to whoever asked."""
        try:
            self._reader.feed(data)
            while (answer := self._reader.gets()) is not _NOTHING:
                if isinstance(answer, PushNotification):
                    continue
                if not self._batch:
                    self._break(RedisConnectionError("a reply that nobody asked for"))
                    return
                if isinstance(answer, ResponseError) and str(answer).startswith(NOT_NOW):
                    self._break(RedisConnectionError(str(answer)))
                    return
                _, reply = self._batch.popleft()
                if reply.done():
                    continue  # its caller was cancelled
                if isinstance(answer, ResponseError):
                    reply.set_exception(answer)
                else:
                    reply.set_result(answer)
        except (ProtocolError, UnicodeDecodeError) as error:
            self._break(RedisConnectionError(str(error)))
            return
        if not self._batch and self._ended is not None:
            ended, self._ended = self._ended, None
            ended(None)

    def connection_lost(self, error: Exception | None) -> None:
        """The other side has closed it, or `close` has."""
        self._before.connection_lost(error)
        self._break(RedisConnectionError(str(error or "the connection was lost")))

    def _look(self) -> None:
        """One timer for all exchanges: it is looked at every few seconds, not set and unset for each."""
        self._alarm = None
        if self.open and self._ended is not None:
            left = self.began + ANSWER_S - self._loop.time()
            if left > 0:
                self._alarm = self._loop.call_later(left, self._look)
            else:
                self._break(_late())

    def _break(self, error: RedisError) -> None:
        ended = self._ended
        self.close()
        if ended is not None:
            ended(error if self._batch else None)


def _is_cut_off(connection: AbstractConnection) -> bool:
    """One that the pool had at hand may be: then it reads no more, and would not tell."""
    return connection._reader is None or connection._reader.at_eof()


#: What a reader gives when no reply is complete.
_NOTHING = object()


def _late() -> RedisTimeout:
    return RedisTimeout(f"no answer within {ANSWER_S:.0f} s")


def _soon(deadline: float) -> float:
    return min(asyncio.get_running_loop().time() + ANSWER_S, deadline)


def _pack(command: Command) -> bytes:
    pack: Callable[[Any], bytes] = pack_command  # hiredis describes a tuple of one element
    return pack(command)
