"""One request's unread output: what gathers between the engine and the task that reads.

Owns the hand-over, and how a reader that was too slow learns so. Does not know other requests, who
decides that it was, or protobuf.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from mili.router.errors import RequestError
from mili.router.parsed_text import Text, join
from mili.router.request import (
    Finish,
    Finished,
    FinishReason,
    RequestOutput,
    Started,
    Timing,
    Usage,
)

_NOTHING_USED = Usage(0, 0, 0, 0)
_NO_TIME = Timing(0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, "")


class Gathered(NamedTuple):
    """What a stream received since it was last read."""

    started: Started | None
    text: Text
    token_ids: list[int]
    first_token_index: int
    finished: Finished | None


class Stream:
    """The unread output of one request: outputs gather while the reader is busy.

    A reader that wants the whole result is woken once, at the end, and not at every step.
    """

    def __init__(self, request_id: str, *, whole: bool) -> None:
        self.request_id = request_id
        self.submitted = False
        self.finished: Finished | None = None
        self.whole = whole
        self.due = 0.0  # not woken before that time of the loop
        self.num_unread_characters = 0
        self._started: Started | None = None
        self._texts: list[Text] = []
        self._token_ids: list[int] = []
        self._first_token_index = 0
        self._error: RequestError | None = None
        self._loop = asyncio.get_running_loop()
        self.woken = False  # and has not read since
        self._waiter: asyncio.Future[None] | None = None

    @property
    def num_unread_tokens(self) -> int:
        return len(self._token_ids)

    def put(self, output: RequestOutput) -> None:
        """Take one step's output."""
        self.finished = output.finished
        if self._error is not None:
            if output.finished is not None:
                failed = Finish(FinishReason.ERROR, error=self._error)
                self.finished = output.finished._replace(finish=failed)
            return
        if output.started is not None:
            self._started = output.started
        if not self._token_ids:
            self._first_token_index = output.first_token_index
        self._token_ids += output.token_ids
        if output.text:
            self._texts.append(output.text)
            self.num_unread_characters += len(output.text)

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
        """Drop what is unread: the stream will end with the error, however the request ends.

        A message that the reader has not taken yet stays with its call, until it takes it, gives
        up, or its connection or deadline ends: gRPC lets nobody else end a call.
        """
        self._error = error
        self._drop_unread()

    async def take(self) -> Gathered:
        """Wait for output, and return all of it."""
        if not self.woken:
            self._waiter = self._loop.create_future()
            await self._waiter
        self.woken = False
        self._waiter = None
        gathered = Gathered(
            self._started,
            join(self._texts),
            self._token_ids,
            self._first_token_index,
            self.finished,
        )
        self._started = None
        self._drop_unread()
        return gathered

    def _drop_unread(self) -> None:
        self._texts = []
        self._token_ids = []
        self.num_unread_characters = 0
