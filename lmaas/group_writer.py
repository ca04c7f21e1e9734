"""Writes what an event loop produces in groups, from a thread of its own."""

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Generic, TypeVar

#: The time for which items are gathered.
EVERY_S = 0.2
#: The time that the last items have to be written when the process ends.
CLOSE_S = 2.0

Item = TypeVar("Item")


class GroupWriter(Generic[Item]):
    """Gives items to `write` in groups. Use as a context manager in a process with a running event loop.

    An item costs the event loop an append to a list. `write` runs in a thread, and returns how many items were lost. While it takes long,
    up to `max_waiting` items wait; later ones are dropped. `dropped` counts both.
    """

    def __init__(self, write: Callable[[Sequence[Item]], int], max_waiting: int, name: str) -> None:
        self._write, self._max_waiting = write, max_waiting
        self._items: list[Item] = []
        self._timer: asyncio.TimerHandle | None = None
        #: True while the thread has items to write.
        self._is_writing = False
        self._groups: queue.SimpleQueue[list[Item] | None] = queue.SimpleQueue()
        # A daemon: a process must be able to end although its log is not read.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._dropped = self._lost = 0

    def __enter__(self) -> "GroupWriter[Item]":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._groups.put(self._items)
        self._groups.put(None)
        self._thread.join(CLOSE_S)

    @property
    def dropped(self) -> int:
        """The number of items that were not written."""
        return self._dropped + self._lost

    def add(self, item: Item) -> None:
        """Write an item soon."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(EVERY_S, self._hand_over)
        if len(self._items) < self._max_waiting:
            self._items.append(item)
        else:
            self._dropped += 1

    def _hand_over(self) -> None:
        self._timer = None
        if self._is_writing:
            self._timer = asyncio.get_running_loop().call_later(EVERY_S, self._hand_over)
            return
        self._is_writing = True
        items, self._items = self._items, []
        self._groups.put(items)

    def _run(self) -> None:
        for items in iter(self._groups.get, None):
            self._lost += self._write(items)
            self._is_writing = False
