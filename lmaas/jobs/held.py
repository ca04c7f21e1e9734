"""The lines that a runner leases at this time."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from lmaas.inference.protocol import AnyInference
from lmaas.inference.sink import Collected
from lmaas.jobs.endings import Tries
from lmaas.jobs.runner import until_set
from lmaas.metering.usage import CANCELLED
from lmaas.store.batch_lines import EndedLine
from lmaas.store.line_leases import LARGE_BYTES, SUSPECT_LOSSES, LeasedLine, Offer

#: The bytes of large lines that are in memory at most, and how much more is allowed for the first line of each tenant and pool.
MAX_BYTES = MAX_FIRST_BYTES = 32 * 1024 * 1024
#: The interval at which a line that waits for room checks whether it is to be given back.
LEAVE_LOOK_S = 0.5


@dataclass(slots=True, eq=False)
class HeldLine:
    """A leased line, from its lease until its end is stored."""

    lease: LeasedLine
    #: The batch's facts.
    offer: Offer
    #: The whole line of the input file, once it is read and until the line has ended.
    text: bytes = b""
    #: True while it is not read because other large lines are in memory; and the bytes that are counted for it since it has room.
    without_room: bool = False
    counted_bytes: int = 0
    tries: Tries = field(default_factory=Tries)
    #: Those of the newest attempt.
    inference: AnyInference | None = None
    sink: Collected | None = None
    #: True if an engine has worked on it under this lease.
    begun: bool = False
    #: True if only the storage of its end is left.
    ended: bool = False
    #: Set when it is to be given back as soon as possible.
    leaving: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pool_id(self) -> str:
        """The pool that serves it."""
        return self.offer.pool_id

    @property
    def batch(self) -> tuple[str, str]:
        """The ids of its tenant and its batch."""
        return self.lease.tenant_id, self.lease.batch_id

    @property
    def runs(self) -> bool:
        """True if an engine works on it."""
        record = getattr(self.inference, "record", None)
        return not self.ended and record is not None and record.run_ms is not None

    def leave(self, code: str) -> None:
        """Have it given back. The engine ends the attempt that runs, which is wasted with this code."""
        self.leaving.set()
        record = getattr(self.inference, "record", None)
        if record is not None:
            record.left = code
        if self.sink is not None:
            self.sink.leave()


class PoolCount(NamedTuple):
    """The lines of a pool that are held, those of them that wait for an engine, and those that an engine began and that were put back since
    they were last counted. Lines that wait for room in memory do not count as waiting for an engine."""

    held: int = 0
    waiting: int = 0
    begun: int = 0
    put_back: int = 0


class HeldLines:
    """The lines of one runner.

    The bytes of large lines in memory have a bound. Those of small ones have none of their own, because the number of lines bounds them.
    Beyond the bound, the first large line of a tenant for a pool has room of its own, so that no tenant waits for the lines of others.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, max_first_bytes: int = MAX_FIRST_BYTES) -> None:
        self._lines: dict[tuple[str, str, int], HeldLine] = {}
        self._max_bytes, self._max_first_bytes, self._bytes = max_bytes, max_first_bytes, 0
        #: The large lines that have room, by tenant and pool.
        self._large: Counter[tuple[str, str]] = Counter()
        self._less = asyncio.Event()
        #: Lines that an engine began, and that were put back, by pool, since `counted` was called.
        self._begun: Counter[str] = Counter()
        self._put_back: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[HeldLine]:
        return iter(list(self._lines.values()))

    def holds(self, lease: LeasedLine) -> bool:
        """Return whether a line is held under this lease."""
        line = self._lines.get((lease.tenant_id, lease.batch_id, lease.position))
        return line is not None and line.lease.attempt == lease.attempt

    def add(self, line: HeldLine) -> None:
        """Add a line that was leased."""
        self._lines[*line.batch, line.lease.position] = line

    def has_room(self, line: HeldLine) -> bool:
        """Return whether the line's bytes may be read now. If so, they are counted. A line alone always has room."""
        size = line.lease.byte_length
        if size > LARGE_BYTES:
            owner, total = (line.lease.tenant_id, line.pool_id), self._bytes + size
            is_first = owner not in self._large
            if self._bytes and total > self._max_bytes and not (is_first and total <= self._max_bytes + self._max_first_bytes):
                return False
            self._bytes, line.counted_bytes = total, size
            self._large[owner] += 1
        line.without_room = False
        return True

    async def room_for(self, line: HeldLine) -> bool:
        """Wait until the line's bytes may be read, and count them. Returns False if the line is to be given back before."""
        while not self.has_room(line):
            if line.leaving.is_set():
                return False
            self._less.clear()
            await until_set(self._less, LEAVE_LOOK_S)
        return True

    def forget_text(self, line: HeldLine) -> None:
        """Drop a line's bytes, which are not needed any more."""
        line.text = b""
        if line.counted_bytes:
            owner = line.lease.tenant_id, line.pool_id
            self._bytes -= line.counted_bytes
            line.counted_bytes = 0
            self._large[owner] -= 1
            if not self._large[owner]:
                del self._large[owner]
            self._less.set()

    @property
    def large_bytes(self) -> int:
        """The bytes of large lines that may be leased now of a batch, for at least one line."""
        return max(1, self._max_bytes - self._bytes)

    def without_room(self, pool_id: str) -> set[str]:
        """Return the tenants whose lines for a pool wait for room."""
        return {line.lease.tenant_id for line in self._lines.values() if line.without_room and line.pool_id == pool_id}

    @property
    def suspects(self) -> int:
        """The number of lines with which several runners were lost."""
        return sum(line.lease.losses >= SUSPECT_LOSSES for line in self._lines.values())

    def remove(self, leases: Iterable[EndedLine | LeasedLine]) -> None:
        """Remove lines whose end is stored."""
        for lease in leases:
            self._lines.pop((lease.tenant_id, lease.batch_id, lease.position), None)

    def leave_waiting(self, batch: tuple[str, str]) -> None:
        """Have those lines of a batch given back that no engine works on."""
        for line in self:
            if line.batch == batch and not line.runs and not line.ended:
                line.leave(CANCELLED)

    def note_begun(self, line: HeldLine) -> None:
        """Count a line that an engine has begun, once for each lease."""
        if not line.begun:
            line.begun = True
            self._begun[line.pool_id] += 1

    def note_put_back(self, line: HeldLine) -> None:
        """Count a line whose slot was taken back."""
        self._put_back[line.pool_id] += 1

    def counted(self) -> dict[str, PoolCount]:
        """Return the figures of each pool that has lines, or had some since the last call."""
        held, waiting = Counter[str](), Counter[str]()
        for line in self._lines.values():
            held[line.pool_id] += 1
            if line.runs:
                self.note_begun(line)
            elif not line.ended and not line.without_room:
                waiting[line.pool_id] += 1
        begun, put_back = self._begun, self._put_back
        self._begun, self._put_back = Counter(), Counter()
        pools = held.keys() | begun.keys() | put_back.keys()
        return {pool: PoolCount(held[pool], waiting[pool], begun[pool], put_back[pool]) for pool in pools}

    def others_run(self, line: HeldLine) -> bool:
        """Return whether an engine works on another line of this tenant."""
        tenant_id = line.lease.tenant_id
        return any(other is not line and other.lease.tenant_id == tenant_id and other.runs for other in self._lines.values())
