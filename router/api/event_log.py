"""The events of one generation as they are sent, for every call that follows it.

Owns their numbers, and how many of them are held. Takes from the stream only what some call waits
for, so that what nobody reads gathers there as any unread output does. Does not know calls, ids or
how long it is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from google.protobuf.message import Message

from mili.router.api.stream import Gathered, Stream
from mili.router.errors import Reason, RequestError

# From what was taken at once, and the number of its first event, to the messages that tell it.
Render = Callable[[Sequence[Gathered], int], Iterable[Message]]

# What an event costs beside its own bytes.
_OVERHEAD = 48


class EventLog:
    """Events from 1 up, in serialized form. It ends with the last, or with an error.

    starting: makes the stream's events once the request is submitted; what it raises is raised to
    everyone who reads. max_bytes: of more the oldest are forgotten.
    """

    def __init__(self, stream: Stream, starting: asyncio.Future[Render], *, max_bytes: int) -> None:
        self._stream = stream
        self._starting = starting
        self._max_bytes = max_bytes
        self._events: list[bytes] = []
        self._first = 1  # the number of the first that is held
        self._num_bytes = 0
        self._ended = False
        self._error: RequestError | None = None
        self._turn = asyncio.Lock()

    @property
    def last(self) -> int:
        """The number of the last event."""
        return self._first + len(self._events) - 1

    @property
    def is_complete(self) -> bool:
        """Whether the last event is the generation's last."""
        return self._ended

    @property
    def num_bytes(self) -> int:
        """What it holds, and what it has not yet taken from the stream; a close guess."""
        stream = self._stream
        return self._num_bytes + stream.num_unread_characters + 8 * stream.num_unread_tokens

    def check(self, after: int, field: str) -> None:
        """Raise RequestError unless all events after this one are held, or still to come."""
        if after > self.last:
            message = f"after_sequence is {after}, and the stream has {self.last} events so far"
            raise RequestError(Reason.INVALID_FIELD, message, field=field)
        if after < self._first - 1:
            message = f"the events up to {self._first - 1} are no longer held"
            raise RequestError(Reason.EVENTS_DROPPED, message, field=field)

    async def read(self, after: int) -> Sequence[bytes]:
        """Wait for events after this one, and return all there are; none where the log has ended.

        Raises RequestError where the generation failed, after its last event; SLOW_READER to one
        that is so late that they are forgotten.
        """
        while after == self.last and not self._ended:
            async with self._turn:
                if after == self.last and not self._ended:
                    render = await asyncio.shield(self._starting)
                    self._record(render, await self._take())
        if after < self._first - 1:
            message = "the output was not read, and others who read it went on; read faster"
            raise RequestError(Reason.SLOW_READER, message)
        events = self._events[after + 1 - self._first :]
        if not events and self._error is not None:
            raise self._error.with_traceback(None)
        return events

    async def _take(self) -> Sequence[Gathered]:
        if self._stream.whole:
            return await self._stream.take_all()
        return [await self._stream.take()]

    def _record(self, render: Render, gathered: Sequence[Gathered]) -> None:
        num_read = len(self._events)
        self._ended = gathered[-1].is_last
        try:
            for message in render(gathered, self.last + 1):
                event = message.SerializeToString()
                self._events.append(event)
                self._num_bytes += len(event) + _OVERHEAD
        except RequestError as error:
            self._error = error
        if self._num_bytes > self._max_bytes:
            self._forget(num_read)

    def _forget(self, num_read: int) -> None:
        """Forget a quarter at once, so that it is not done for every event; none that is new."""
        dropped = 0
        while self._num_bytes > self._max_bytes * 3 // 4 and dropped < num_read:
            self._num_bytes -= len(self._events[dropped]) + _OVERHEAD
            dropped += 1
        del self._events[:dropped]
        self._first += dropped
