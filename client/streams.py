"""Streams as Python iterates over them: `TextStream`, and `AsyncTextStream` for asyncio.

Owns reading, leaving, and going on after a loss. What an event means is partial.py's, and where a
stream goes on is resume.py's.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Protocol, Self

import grpc

from mili.client.errors import Cancelled, MiliError, translated_errors
from mili.client.partial import PartialGeneration
from mili.client.resume import Resumption
from mili.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from pydantic import BaseModel


class _Response(Protocol):
    @property
    def event(self) -> pb.StreamEvent: ...


class _Call(Protocol):
    def __iter__(self) -> Iterator[_Response]: ...
    def cancel(self) -> object: ...


class _AsyncCall(Protocol):
    def __aiter__(self) -> AsyncIterator[_Response]: ...
    def cancel(self) -> object: ...


class _Resumable(PartialGeneration):
    def __init__(self, resumption: Resumption, response_model: type[BaseModel] | None) -> None:
        super().__init__(response_model)
        self._resumption = resumption

    @property
    def resume_token(self) -> str:
        """What `attach` takes, also in another process; empty without a resume_window."""
        return self._resumption.token

    @property
    def last_sequence(self) -> int:
        """The number of the last event that was read: `attach` takes it as after_sequence."""
        return self._resumption.last_sequence


class TextStream(_Resumable):
    """Text as it is generated: iterate over it; of several sequences, it is the first's.

    Leaving the loop early, `close`, and the end of a `with` block cancel the generation. After
    the last piece, `finish_reason`, `usage` and the whole `generation` are there. With a
    resume_window a lost connection is made again, and nothing comes twice; leaving then ends the
    reading, and the server ends the generation when the window is over.
    """

    def __init__(
        self,
        call: _Call,
        attach: Callable[[pb.AttachStreamRequest], _Call],
        resumption: Resumption,
        response_model: type[BaseModel] | None = None,
    ) -> None:
        super().__init__(resumption, response_model)
        self._call = call
        self._attach = attach
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[str]:
        for event in self.events():
            if event.delta.text and event.delta.index == 0:
                yield event.delta.text

    def events(self) -> Iterator[pb.StreamEvent]:
        """The events themselves, for callers that want token ids or times beside the text."""
        try:
            while True:
                try:
                    with translated_errors():
                        for response in self._call:
                            if self._resumption.takes(response.event):
                                self.push(response.event)
                                yield response.event
                    break
                except MiliError as error:
                    self._go_on_after(error)
            self.end()
        finally:
            self.close()

    def close(self) -> None:
        self._closed.set()
        self._call.cancel()

    def _go_on_after(self, error: MiliError) -> None:
        """Attach again. Raises the error where that is of no use."""
        if self._closed.wait(self._resumption.delay(error)):
            raise Cancelled(grpc.StatusCode.CANCELLED, "the stream was closed") from None
        self._call = self._attach(self._resumption.request())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncTextStream(_Resumable):
    """Text as it is generated: iterate over it with `async for`; see TextStream.

    Cancelling the task leaves the stream too.
    """

    def __init__(
        self,
        call: _AsyncCall,
        attach: Callable[[pb.AttachStreamRequest], _AsyncCall],
        resumption: Resumption,
        response_model: type[BaseModel] | None = None,
    ) -> None:
        super().__init__(resumption, response_model)
        self._call = call
        self._attach = attach
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[str]:
        async for event in self.events():
            if event.delta.text and event.delta.index == 0:
                yield event.delta.text

    async def events(self) -> AsyncIterator[pb.StreamEvent]:
        """The events themselves, for callers that want token ids or times beside the text."""
        try:
            while True:
                try:
                    with translated_errors():
                        async for response in self._call:
                            if self._resumption.takes(response.event):
                                self.push(response.event)
                                yield response.event
                    break
                except MiliError as error:
                    await self._go_on_after(error)
            self.end()
        except asyncio.CancelledError:
            # gRPC raises this also where another task closed the stream, and this one lives on.
            if self._closed:
                raise Cancelled(grpc.StatusCode.CANCELLED, "the stream was closed") from None
            raise
        finally:
            self.close()

    def close(self) -> None:
        self._closed = True
        self._call.cancel()

    async def _go_on_after(self, error: MiliError) -> None:
        """Attach again. Raises the error where that is of no use."""
        await asyncio.sleep(self._resumption.delay(error))
        if self._closed:
            raise Cancelled(grpc.StatusCode.CANCELLED, "the stream was closed") from None
        self._call = self._attach(self._resumption.request())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
