"""Answers that arrive while the caller is there: server-sent events, and the end of a caller.

Owns when a call is left. Does not know what is in a chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import grpc
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mili.client.errors import Cancelled, MiliError, from_message
from mili.client.http.answers import Json
from mili.client.http.errors import event_of_error
from mili.client.results import Usage
from mili.client.streams import AsyncTextStream
from mili.v1 import inference_pb2 as pb

_Result = TypeVar("_Result")
_Event = tuple[int, pb.StreamEvent]


class Chunks(Protocol):
    """What the events of the number-th stream become, and the usage of all."""

    def of(self, number: int, event: pb.StreamEvent) -> Iterator[Json]: ...
    def end(self, usages: list[Usage]) -> Json: ...


async def while_connected(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Do the work unless the caller hangs up, which cancels it. The body must have been read."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Cancelled(grpc.StatusCode.CANCELLED, "the caller hung up")
    finally:
        for task in (working, gone):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, MiliError):
                await task


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """The chunks of one answer, which several streams may make.

    `begin` waits for the first event, so that what the server refuses has an HTTP code of its own.
    """

    def __init__(
        self, streams: Sequence[AsyncTextStream], chunks: Chunks, *, include_usage: bool
    ) -> None:
        self._streams = streams
        self._chunks = chunks
        self._include_usage = include_usage
        self._events = _merged(streams)
        self._first: _Event | None = None
        super().__init__(self._lines(), media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"

    async def begin(self, request: Request) -> None:
        """Raises MiliError."""
        try:
            self._first = await while_connected(request, _next(self._events))
        except BaseException:
            self._leave()
            raise
        self.headers["x-request-id"] = self._streams[0].request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()

    async def _lines(self) -> AsyncIterator[str]:
        try:
            assert self._first is not None
            for line in self._event_lines(*self._first):
                yield line
            async for number, event in self._events:
                for line in self._event_lines(number, event):
                    yield line
        except MiliError as error:
            yield event_of_error(error)
            return
        if self._include_usage:
            yield _line(self._chunks.end([stream.usage for stream in self._streams]))
        yield "data: [DONE]\n\n"

    def _event_lines(self, number: int, event: pb.StreamEvent) -> Iterator[str]:
        # A choice has no error of its own in this API: it is the call's.
        if event.finished.finish_reason == pb.FINISH_REASON_ERROR:
            raise from_message(event.finished.error)
        return map(_line, self._chunks.of(number, event))

    def _leave(self) -> None:
        for stream in self._streams:
            stream.close()


async def _merged(streams: Sequence[AsyncTextStream]) -> AsyncIterator[_Event]:
    """The events of all streams as they come, with the number of the stream."""
    if len(streams) == 1:
        async for event in streams[0].events():
            yield 0, event
        return
    sources = [stream.events() for stream in streams]
    waiting = {asyncio.create_task(_next(source)): n for n, source in enumerate(sources)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = waiting.pop(task)
                with contextlib.suppress(StopAsyncIteration):
                    event = task.result()
                    waiting[asyncio.create_task(_next(sources[number]))] = number
                    yield number, event
    finally:
        for task in waiting:
            task.cancel()
        # Nobody else hears how they ended.
        await asyncio.gather(*waiting, return_exceptions=True)


async def _next(source: AsyncIterator[_Result]) -> _Result:
    following: Awaitable[_Result] = anext(source)
    return await following


def _line(chunk: Json) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
