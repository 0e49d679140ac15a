"""A stream whose caller said how many tokens, or how much time, a message is worth.

Owns where one message ends and the next begins. Does not know who reads when.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque

from mili.router.api.stream import Stream, Unread
from mili.router.api.stream_options import Flush
from mili.router.errors import RequestError
from mili.router.outcome import RequestOutput


class CoalescedStream(Stream):
    """Its reader takes one full message at a time; the last of a sequence may be smaller."""

    def __init__(self, request_id: str, flush: Flush) -> None:
        super().__init__(request_id, whole=False)
        self.ready = False
        self._flush = flush
        self._messages: deque[tuple[int, Unread]] = deque()  # full, and not taken
        self._timer: asyncio.TimerHandle | None = None

    def put(self, output: RequestOutput) -> None:
        """Take one step's output. Tokens that were forced may be more than a message takes."""
        while len(output.token_ids) > (room := self._room(output.index)):
            first = output.first_token_index
            # The text comes with the last of the tokens, as text that was held back does.
            self._put(RequestOutput("", output.token_ids[:room], "", first, index=output.index))
            rest = output.token_ids[room:]
            output = output._replace(token_ids=rest, first_token_index=first + room)
        self._put(output)

    def _room(self, index: int) -> int:
        """Tokens that the next message of a sequence may still take."""
        unread = self._unread.get(index)
        return self._flush.max_tokens - (len(unread.token_ids) if unread else 0)

    def _put(self, output: RequestOutput) -> None:
        super().put(output)
        if self.finished is not None:
            self._end_messages()
        elif (unread := self._unread.get(output.index)) is None:
            return  # it was cut
        elif (
            # What is no token is told at once.
            not output.token_ids
            or output.finished is not None
            or len(unread.token_ids) >= self._flush.max_tokens
        ):
            self._end_message(output.index)
        elif self._timer is None and self._flush.interval < math.inf:
            self._timer = self._loop.call_later(self._flush.interval, self._time_is_over)

    def wake(self) -> None:
        """Let the reader take a message, if there is one."""
        if self._messages:
            super().wake()

    def cut(self, error: RequestError) -> None:
        """Drop what is unread, as any stream does."""
        super().cut(error)
        if not self.keeps_unread:
            self._messages.clear()

    def _next(self) -> tuple[int, Unread]:
        if not self._messages:  # it was cut
            return super()._next()
        message = self._messages.popleft()
        self.ready = self.woken = bool(self._messages)
        return message

    def _end_message(self, index: int) -> None:
        self._messages.append((index, self._unread.pop(index)))
        self.ready = True
        if self._timer is not None and not self._unread:
            self._timer.cancel()
            self._timer = None

    def _end_messages(self) -> None:
        for index in list(self._unread):
            self._end_message(index)

    def _time_is_over(self) -> None:
        self._timer = None
        self._end_messages()
        self.wake()
