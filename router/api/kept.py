"""Generations that outlive a call: several calls may follow one, and come back to it.

Owns which generation a request id or a resume token names, and when one is forgotten, or cancelled
for want of calls. Does not know what is generated, or protobuf.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from mili.router.api.event_log import EventLog, Render
from mili.router.api.status import NotFoundError, ResourceError
from mili.router.api.stream import Stream
from mili.router.api.streams import Streams
from mili.router.errors import Reason, RequestError

# Seconds that the answer to a request id can be asked for again.
ANSWER_SECONDS = 120.0
# What all generations may hold together that have ended.
MAX_ENDED_BYTES = 64 << 20
# Bytes of events that a log holds, for each token that may be unread.
BYTES_PER_TOKEN = 128

_TOKEN = re.compile(r"([0-9a-f]{32})\.([A-Za-z0-9_-]{32})")


class Kept:
    """One generation. digest: of its request. window: seconds that it runs on without a call."""

    def __init__(
        self,
        log: EventLog,
        stream: Stream,
        start: asyncio.Task[Render],
        *,
        tenant: str,
        digest: bytes,
        window: float,
        secret: str,
    ) -> None:
        self.log = log
        self.stream = stream
        self.start = start
        self.tenant = tenant
        self.digest = digest
        self.window = window
        self.secret = secret
        self.num_calls = 0
        self.num_bytes = 0  # counted when it has ended
        self.left_at = self.ended_at = 0.0
        self.forgotten = False
        self.expiry: asyncio.TimerHandle | None = None

    @property
    def succeeded(self) -> bool:
        finished = self.stream.finished
        return finished is not None and finished.failure is None

    @property
    def dies_at(self) -> float:
        """When it is over, by the loop's time, if no call comes until then."""
        answer = self.ended_at + ANSWER_SECONDS if self.succeeded else 0.0
        return max(self.left_at + self.window, answer)


class KeptGenerations:
    """All that are remembered. Every method runs on the asyncio thread.

    max_unread_tokens: as Streams has it; a log holds as much again.
    """

    def __init__(self, streams: Streams, instance_id: str, max_unread_tokens: int) -> None:
        self._streams = streams
        self._instance_id = instance_id
        self._max_log_bytes = max_unread_tokens * BYTES_PER_TOKEN
        self._by_id: dict[str, Kept] = {}
        self._by_secret: dict[str, Kept] = {}
        self._ended: dict[Kept, None] = {}  # oldest first
        self._ended_bytes = 0

    def find(self, request_id: str, digest: bytes) -> Kept | None:
        """Return the generation of an id; raise RequestError where another request began it."""
        kept = self._by_id.get(request_id)
        if kept is None:
            return None
        if kept.digest != digest:
            message = "the id is that of another request, which runs or ended a moment ago"
            raise RequestError(Reason.REQUEST_ID_CONFLICT, message, field="request_id")
        kept.log.check(0, "request_id")
        return kept

    def begin(
        self,
        stream: Stream,
        start: Callable[[str], Coroutine[Any, Any, Render]],
        *,
        tenant: str,
        digest: bytes,
        window: float,
    ) -> Kept:
        """Keep a new generation. start: gets the resume token, and submits the request."""
        secret = secrets.token_urlsafe(24)
        starting = asyncio.create_task(start(f"{self._instance_id}.{secret}" if window else ""))
        log = EventLog(stream, starting, max_bytes=self._max_log_bytes)
        kept = Kept(
            log, stream, starting, tenant=tenant, digest=digest, window=window, secret=secret
        )
        stream.keeps_unread = window > 0
        stream.on_end.append(lambda: self._has_ended(kept))
        starting.add_done_callback(lambda _: self._has_started(kept))
        self._by_id[stream.request_id] = kept
        if window:
            self._by_secret[secret] = kept
        return kept

    def attach(self, token: str, tenant: str, after: int) -> Kept:
        """Return the generation of a resume token.

        Who has all of one that has ended needs it no more: it is forgotten. Raises RequestError for
        a token that is nobody's or another tenant's, and for events that are not held.
        """
        match = _TOKEN.fullmatch(token)
        if match and match[1] != self._instance_id:
            message = f"router {match[1]} holds this stream, and this is {self._instance_id}"
            raise ResourceError(
                Reason.OTHER_INSTANCE, "router", match[1], message, field="resume_token"
            )
        kept = self._by_secret.get(match[2]) if match else None
        if kept is None or kept.tenant != tenant:
            raise NotFoundError(Reason.REQUEST_NOT_FOUND, "stream", token, field="resume_token")
        kept.log.check(after, "after_sequence")
        if kept.log.is_complete and after == kept.log.last:
            self._forget(kept)
        return kept

    @contextmanager
    def followed(self, kept: Kept) -> Iterator[EventLog]:
        """A call follows the generation until the block ends."""
        kept.num_calls += 1
        if kept.expiry is not None:
            kept.expiry.cancel()
        try:
            yield kept.log
        finally:
            kept.num_calls -= 1
            kept.left_at = asyncio.get_running_loop().time()
            self._judge(kept)

    def _judge(self, kept: Kept) -> None:
        """Forget what no call follows when its time is over; cancel it if it still runs."""
        if kept.num_calls or kept.forgotten:
            return
        loop = asyncio.get_running_loop()
        if loop.time() < kept.dies_at:
            kept.expiry = loop.call_at(kept.dies_at, self._judge, kept)
            return
        kept.start.cancel()
        self._streams.close(kept.stream)
        self._forget(kept)

    def _has_started(self, kept: Kept) -> None:
        """A request that could not be submitted may be tried again at once."""
        if kept.start.cancelled() or kept.start.exception() is not None:
            self._streams.close(kept.stream)
            self._forget(kept)

    def _has_ended(self, kept: Kept) -> None:
        """So may one that failed. Of those that succeeded, the oldest go if they are too many."""
        if kept.forgotten:
            return
        kept.ended_at = asyncio.get_running_loop().time()
        if not kept.succeeded and self._by_id.get(kept.stream.request_id) is kept:
            del self._by_id[kept.stream.request_id]
        kept.num_bytes = kept.log.num_bytes
        self._ended[kept] = None
        self._ended_bytes += kept.num_bytes
        while self._ended_bytes > MAX_ENDED_BYTES:
            self._forget(next(iter(self._ended)))

    def _forget(self, kept: Kept) -> None:
        kept.forgotten = True
        if kept.expiry is not None:
            kept.expiry.cancel()
        if self._by_id.get(kept.stream.request_id) is kept:
            del self._by_id[kept.stream.request_id]
        self._by_secret.pop(kept.secret, None)
        if kept in self._ended:
            del self._ended[kept]
            self._ended_bytes -= kept.num_bytes
