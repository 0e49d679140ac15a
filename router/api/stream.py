"""One call's unread output: what gathers between the engine and the task that reads.

Owns the hand-over, and how a reader that was too slow learns so. Does not know other requests, who
decides that it was, or protobuf.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mili.router.errors import RequestError
from mili.router.outcome import (
    Finish,
    Finished,
    FinishReason,
    Recovery,
    RequestOutput,
    Started,
    Timing,
    Usage,
)
from mili.router.parsed_text import Text, join
from mili.router.readings import Readings

_NOTHING_USED = Usage(0, 0, 0, 0)
_NO_TIME = Timing(0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, "")


class Gathered(NamedTuple):
    """What one sequence of a stream received since it was last read."""

    started: Started | None
    text: Text
    token_ids: list[int]
    first_token_index: int
    finished: Finished | None
    index: int = 0  # type: ignore[assignment]  # It hides tuple.index.
    readings: Sequence[Readings] = ()
    recoveries: tuple[Recovery, ...] = ()

    @property
    def is_last(self) -> bool:
        """Whether nothing comes after it."""
        return self.finished is not None and not self.finished.num_left


class Unread:
    """What gathers for one sequence."""

    __slots__ = (
        "finished",
        "first_token_index",
        "readings",
        "recoveries",
        "texts",
        "token_ids",
    )

    def __init__(self, first_token_index: int) -> None:
        self.texts: list[Text] = []
        self.token_ids: list[int] = []
        self.first_token_index = first_token_index
        self.readings: list[Readings] | None = None
        self.finished: Finished | None = None
        self.recoveries: tuple[Recovery, ...] = ()


_NOTHING_UNREAD = Unread(0)


class Stream:
    """The unread output of one call: outputs gather while the reader is busy.

    finished: of the last of its sequences, when that has ended.

    A reader that wants the whole result is woken once, at the end, and not at every step.
    """

    def __init__(self, request_id: str, *, whole: bool) -> None:
        self.request_id = request_id
        self.submitted = False
        self.finished: Finished | None = None
        self.whole = whole
        self.ready = not whole  # for a turn of the reader, whenever there is output
        self.due = 0.0  # not woken before that time of the loop
        # Called when the id's life is over; `finished` is set unless the request never began.
        self.on_end: list[Callable[[], None]] = []
        # Also when it is cut: another reader may come.
        self.keeps_unread = False
        self.num_unread_characters = 0
        self.num_unread_tokens = 0
        self._started: Started | None = None
        self._unread: dict[int, Unread] = {}  # by sequence; those that have ended: in that order
        self._error: RequestError | None = None
        self._loop = asyncio.get_running_loop()
        self.woken = False  # and has not read since
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: RequestOutput) -> None:
        """Take one step's output."""
        if self._error is not None:
            if output.finished is not None and not output.finished.num_left:
                self._fail(output.finished, self._error)
            return
        if output.started is not None:
            self._started = output.started
        index, token_ids, text = output.index, output.token_ids, output.text
        unread = self._unread.get(index)
        if unread is None:
            unread = self._unread[index] = Unread(output.first_token_index)
        if output.recovery is not None:
            unread.recoveries += (output.recovery,)
        unread.token_ids += token_ids
        self.num_unread_tokens += len(token_ids)
        if text:
            unread.texts.append(text)
            self.num_unread_characters += len(text)
        if output.readings is not None:
            if unread.readings is None:
                unread.readings = []
            unread.readings.append(output.readings)
        if output.finished is not None:
            unread.finished = output.finished
            self._unread[index] = self._unread.pop(index)
            if not output.finished.num_left:
                self.finished = output.finished

    def wake(self) -> None:
        """Let the reader take what there is."""
        self.woken = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def end(self, finish: Finish) -> None:
        """End the stream without the engine."""
        self.put(RequestOutput("", finished=Finished(finish, _NOTHING_USED, _NO_TIME)))
        self.wake()

    def cut(self, error: RequestError) -> None:
        """Drop what is unread, unless it is kept: the stream will end with the error, however the
        request ends.

        A message that the reader has not taken yet stays with its call, until it takes it, gives
        up, or its connection or deadline ends: gRPC lets nobody else end a call.
        """
        self._error = error
        if not self.keeps_unread:
            self._unread.clear()
            self.num_unread_tokens = self.num_unread_characters = 0

    async def take(self) -> Gathered:
        """Wait for output, and return all of it, of one sequence after the other."""
        if not self.woken:
            self._waiter = self._loop.create_future()
            await self._waiter
        self._waiter = None
        index, unread = self._next()
        text = join(unread.texts)
        self.num_unread_tokens -= len(unread.token_ids)
        self.num_unread_characters -= len(text)
        started, self._started = self._started, None
        return Gathered(
            started,
            text,
            unread.token_ids,
            unread.first_token_index,
            unread.finished,
            index,
            unread.readings or (),
            unread.recoveries,
        )

    async def take_all(self) -> list[Gathered]:
        """Wait for the end, and return what each sequence gave: of a stream that is read whole."""
        gathered = [await self.take()]
        while not gathered[-1].is_last:
            gathered.append(await self.take())
        return gathered

    def _next(self) -> tuple[int, Unread]:
        """Which sequence to read now, and what of it; `woken` says whether there is more."""
        index = next(iter(self._unread), 0)
        unread = self._unread.pop(index, _NOTHING_UNREAD)
        self.woken = bool(self._unread)
        return index, unread

    def _fail(self, finished: Finished, error: RequestError) -> None:
        """The last sequence has ended after the stream was cut."""
        failed = Finish(FinishReason.ERROR, error=error)
        self.finished = finished._replace(finish=failed, others_succeeded=False)
        last = self._unread.pop(0, None) or Unread(0)
        last.finished = self.finished
        self._unread[0] = last
