"""When the reader of a stream is woken: at once while streams are few, in turns when they are many.

Owns the turns. Does not know what is read. A gRPC message costs about as much CPU for one token as
for sixteen, and all messages of a step at once would keep the loop from sending the next step: so
with many streams each is written to less often, and only a few between two looks at the sockets.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

# Seconds between two messages of a stream, for each stream that lives; at most the longest.
INTERVAL_PER_STREAM = 160e-6
LONGEST_INTERVAL = 0.040
# Readers that are woken before the loop looks at its sockets again.
SLICE = 16


class Reader(Protocol):
    """Something that is woken; `due`: not before that time of the loop."""

    due: float

    def wake(self) -> None:
        """Let it read what it has."""


class Pacer:
    """Readers that have something to read, in the order of their turns."""

    def __init__(self) -> None:
        self._urgent: deque[Reader] = deque()
        self._paced: dict[Reader, None] = {}
        self._next: asyncio.Handle | None = None

    def add(self, reader: Reader, *, urgent: bool) -> None:
        """Give the reader a turn: as soon as may be, or when it is due."""
        if urgent:
            self._paced.pop(reader, None)
            self._urgent.append(reader)
        else:
            self._paced.setdefault(reader)

    def wake_due(self, num_streams: int) -> None:
        """Wake the first of those whose turn has come; the others will be woken by themselves."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        interval = min(num_streams * INTERVAL_PER_STREAM, LONGEST_INTERVAL)
        for _ in range(SLICE):
            reader = self._take(now)
            if reader is None:
                break
            reader.due = now + interval
            reader.wake()
        if self._next is not None:
            self._next.cancel()
            self._next = None
        first = next(iter(self._paced), None)
        if self._urgent or (first is not None and first.due <= now):
            self._next = loop.call_soon(self.wake_due, num_streams)
        elif first is not None:
            self._next = loop.call_at(first.due, self.wake_due, num_streams)

    def _take(self, now: float) -> Reader | None:
        if self._urgent:
            return self._urgent.popleft()
        first = next(iter(self._paced), None)
        if first is None or first.due > now:
            return None
        del self._paced[first]
        return first
