"""The live requests: from the engine's batches of outputs to each request's own stream.

Owns which request ids are live and what of their output is not yet sent. Does not know protobuf.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import NamedTuple

from mili.router.api.engine import Engine
from mili.router.api.pacing import Pacer
from mili.router.errors import Reason, RequestError
from mili.router.request import (
    Finish,
    Finished,
    FinishReason,
    GenerationParams,
    RequestOutput,
    Started,
    Timing,
    Usage,
)

# Of so many ended requests the ids are remembered, to tell "ended" from "never seen".
_REMEMBERED = 4096

_NOTHING_USED = Usage(0, 0, 0, 0)
_NO_TIME = Timing(0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, "")


class Gathered(NamedTuple):
    """What a stream received since it was last read."""

    started: Started | None
    text: str
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
        self._started: Started | None = None
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._first_token_index = 0
        self._wake = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        """Take one step's output."""
        if output.started is not None:
            self._started = output.started
        if not self._token_ids:
            self._first_token_index = output.first_token_index
        self._token_ids += output.token_ids
        if output.text:
            self._texts.append(output.text)
        self.finished = output.finished

    def wake(self) -> None:
        """Let the reader take what there is."""
        self._wake.set()

    def end(self, finish: Finish) -> None:
        """End the stream without the engine."""
        self.put(RequestOutput("", finished=Finished(finish, _NOTHING_USED, _NO_TIME)))
        self.wake()

    async def take(self) -> Gathered:
        """Wait for output, and return all of it."""
        await self._wake.wait()
        self._wake.clear()
        gathered = Gathered(
            self._started,
            "".join(self._texts),
            self._token_ids,
            self._first_token_index,
            self.finished,
        )
        self._started = None
        self._texts = []
        self._token_ids = []
        return gathered


class Streams:
    """All live requests. Every method runs on the asyncio thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._live: dict[str, Stream] = {}
        self._ended: dict[str, None] = {}  # oldest first
        self._pacer = Pacer()
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._live)

    def open(self, request_id: str, *, whole: bool) -> Stream:
        """Make a request id live; raise RequestError where it is, or while draining."""
        if self._draining:
            raise RequestError(Reason.DRAINING, "the server is shutting down")
        if request_id in self._live:
            raise RequestError(
                Reason.REQUEST_ID_CONFLICT, "a request of this id is running", field="request_id"
            )
        stream = self._live[request_id] = Stream(request_id, whole=whole)
        self._empty.clear()
        return stream

    def submit(self, stream: Stream, params: GenerationParams) -> None:
        """Hand the request to the engine, unless it was cancelled in the meantime."""
        if stream.finished is None:
            self._engine.submit(stream.request_id, params)
            stream.submitted = True

    def deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Take the engine's outputs of one step; a stream's last one ends its id's life."""
        for output in outputs:
            stream = self._live.get(output.request_id)
            if stream is None:
                continue
            stream.put(output)
            if output.finished is not None:
                self._forget(stream)
            if output.finished is not None or not stream.whole:
                # The first token and the end do not wait for their turn.
                urgent = output.finished is not None or output.first_token_index == 0
                self._pacer.add(stream, urgent=urgent)
        self._pacer.wake_due(len(self._live))

    def cancel(self, request_id: str) -> bool:
        """End a request; return False when it had ended, raise KeyError for an unknown id."""
        stream = self._live.get(request_id)
        if stream is None:
            if request_id not in self._ended:
                raise KeyError(request_id)
            return False
        if stream.submitted:
            return self._engine.cancel(request_id)
        stream.end(Finish(FinishReason.CANCELLED))
        self._forget(stream)
        return True

    def close(self, stream: Stream) -> None:
        """The reader is gone: whatever still runs for it is cancelled.

        The id of a cancelled request stays live until the engine has delivered its end, so that
        no late output can reach a new request of the same id.
        """
        if self._live.get(stream.request_id) is not stream:
            return
        if not (stream.submitted and self._engine.cancel(stream.request_id)):
            self._forget(stream)

    async def drain(self, grace: float) -> None:
        """Refuse new requests; wait `grace` seconds for the live ones, and end the rest."""
        self._draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), grace)
        except TimeoutError:
            error = RequestError(Reason.DRAINING, "the server shut down before the request ended")
            for stream in list(self._live.values()):
                stream.end(Finish(FinishReason.ERROR, error=error))
                self._forget(stream)
                self._engine.cancel(stream.request_id)

    def _forget(self, stream: Stream) -> None:
        del self._live[stream.request_id]
        self._ended[stream.request_id] = None
        if len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]
        if not self._live:
            self._empty.set()
