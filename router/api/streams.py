"""The live requests: from the engine's batches of outputs to each request's own stream.

Owns which request ids are live, and how much of their output may be unread: the engine never waits
for a reader, so one that does not read loses its stream. Does not know protobuf.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from mili.router.api.coalesced import CoalescedStream
from mili.router.api.engine import Engine
from mili.router.api.pacing import Pacer
from mili.router.api.stream import Stream
from mili.router.api.stream_options import Flush
from mili.router.errors import Reason, RequestError
from mili.router.outcome import Finish, FinishReason, RequestOutput
from mili.router.params import GenerationParams

# Of so many ended requests the ids are remembered, to tell "ended" from "never seen".
_REMEMBERED = 4096
# Characters that may be unread for each token that may: text is of its own length.
_CHARACTERS_PER_TOKEN = 16


class Streams:
    """All live requests. Every method runs on the asyncio thread.

    max_unread_tokens: what may gather for a reader that does not read. One that wants the whole
    result has as much as it asked for.
    """

    def __init__(self, engine: Engine, max_unread_tokens: int) -> None:
        self._engine = engine
        self._max_unread_tokens = max_unread_tokens
        self._max_unread_characters = max_unread_tokens * _CHARACTERS_PER_TOKEN
        self._live: dict[str, Stream] = {}
        self._ended: dict[str, None] = {}  # oldest first
        self._pacer = Pacer()
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._live)

    def open(self, request_id: str, *, whole: bool, flush: Flush | None = None) -> Stream:
        """Make a request id live; raise RequestError where it is, or while draining."""
        if self._draining:
            raise RequestError(Reason.DRAINING, "the server is shutting down")
        if request_id in self._live:
            raise RequestError(
                Reason.REQUEST_ID_CONFLICT, "a request of this id is running", field="request_id"
            )
        stream = CoalescedStream(request_id, flush) if flush else Stream(request_id, whole=whole)
        self._live[request_id] = stream
        self._empty.clear()
        return stream

    def submit(self, stream: Stream, params: GenerationParams) -> None:
        """Hand the request to the engine, unless it was cancelled in the meantime."""
        if stream.finished is None:
            self._engine.submit(stream.request_id, params)
            stream.submitted = True

    def deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Take the engine's outputs of one step; a stream's last one ends its id's life."""
        slow: list[Stream] = []
        for output in outputs:
            stream = self._live.get(output.request_id)
            if stream is None:
                continue
            stream.put(output)
            if stream.finished is not None:
                self._forget(stream)
                self._pacer.add(stream, urgent=True)
            elif stream.ready:
                # The first token does not wait for its turn.
                self._pacer.add(stream, urgent=output.first_token_index == 0)
                if stream.woken and self._is_slow(stream):
                    slow.append(stream)
        # The engine answers a cancel with outputs: this method must have come to its end.
        for stream in dict.fromkeys(slow):
            self._cut(stream)
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

    def _is_slow(self, stream: Stream) -> bool:
        return (
            stream.num_unread_tokens > self._max_unread_tokens
            or stream.num_unread_characters > self._max_unread_characters
        )

    def _cut(self, stream: Stream) -> None:
        unread = f"{stream.num_unread_tokens} tokens, {stream.num_unread_characters} characters"
        message = f"the output was not read: {unread} waited; read faster, or ask for it whole"
        stream.cut(RequestError(Reason.SLOW_READER, message))
        self._engine.cancel(stream.request_id)

    def _forget(self, stream: Stream) -> None:
        del self._live[stream.request_id]
        self._ended[stream.request_id] = None
        if len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]
        if not self._live:
            self._empty.set()
        for hear in stream.on_end:
            hear()
