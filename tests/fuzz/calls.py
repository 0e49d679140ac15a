"""Calls with drawn bytes to a running server, many at once, and a judgement on each answer.

Owns what an answer may be: reliability.md's status contract. Does not know what the bytes mean.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from mili.router.errors import Reason

# Seconds. A call that takes so long hangs.
PATIENCE = 60.0
MAX_IN_FLIGHT = 96
# Ours alone: neither a drawn byte nor a lack of anything may lead to it.
NEVER = frozenset({Reason.INTERNAL, Reason.POISON_REQUEST, Reason.WORKER_LOST})


class Call(NamedTuple):
    """One call. timeout: seconds; reads: leave a stream after so many answers."""

    method: str
    streams: bool
    request: bytes
    timeout: float = PATIENCE
    reads: int = 1000


class Verdict(NamedTuple):
    """How a call ended: a status code's name, and the ErrorInfo reason; LEFT if we left it."""

    code: str
    reason: str


class Caller:
    """Makes calls on a thread of its own. `verdicts` counts how they ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop, public: str, admin: str) -> None:
        self.verdicts: Counter[tuple[str, Verdict]] = Counter()
        self._loop = loop
        self._free = threading.Semaphore(MAX_IN_FLIGHT)
        self._channels = {False: _channel(public), True: _channel(admin)}
        self._failures: list[BaseException] = []

    def call(self, call: Call) -> None:
        """Begin a call, waiting while too many run; do nothing more once one has failed."""
        if self._failures:
            return
        assert self._free.acquire(timeout=2 * PATIENCE), "the calls hang"
        future = asyncio.run_coroutine_threadsafe(self._made(call), self._loop)
        future.add_done_callback(self._done)

    def finish(self) -> None:
        """Wait for every call. Raises what the first that failed was judged."""
        for _ in range(MAX_IN_FLIGHT):
            assert self._free.acquire(timeout=2 * PATIENCE), "the calls hang"
        self._free.release(MAX_IN_FLIGHT)
        if self._failures:
            raise self._failures[0]

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    def _done(self, future: Future[None]) -> None:
        if error := future.exception():
            self._failures.append(error)
        self._free.release()

    async def _made(self, call: Call) -> None:
        verdict = await made(self._channels["Admin" in call.method], call)
        self.verdicts[call.method, verdict] += 1


@contextmanager
def calling(public: str, admin: str) -> Iterator[Caller]:
    """A caller of two listeners, until the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="caller")
    thread.start()

    async def make() -> Caller:
        return Caller(loop, public, admin)

    try:
        caller = asyncio.run_coroutine_threadsafe(make(), loop).result()
        yield caller
        asyncio.run_coroutine_threadsafe(caller.close(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def made(channel: aio.Channel, call: Call) -> Verdict:
    """Make a call. AssertionError for an end that the contract does not know."""
    left = False
    if call.streams:
        stream = channel.unary_stream(call.method)(call.request, timeout=call.timeout)
        left = await _read(stream, call.reads)
        ended: Any = stream
    else:
        ended = channel.unary_unary(call.method)(call.request, timeout=call.timeout)
    # A call's own status may never come while its messages are not read.
    code = await asyncio.wait_for(ended.code(), PATIENCE + 10)
    if left:
        return Verdict("LEFT", "")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and call.timeout < PATIENCE:
        # The client itself ends a call at its deadline, whatever else has come of it.
        return Verdict(code.name, "")
    reason = await _reason(ended)
    await _judge(call, code, reason, ended)
    return Verdict(code.name, reason)


async def _read(stream: Any, reads: int) -> bool:  # noqa: ANN401
    """Read some answers; return whether we left before the end."""
    try:
        for _ in range(reads):
            if await stream.read() is aio.EOF:
                return False
    except grpc.RpcError:
        return False
    return bool(stream.cancel())


async def _reason(call: Any) -> str:  # noqa: ANN401
    # Not rpc_status.from_call, which fails where gRPC left the message percent-encoded.
    trailers = dict(await call.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
    info = error_details_pb2.ErrorInfo()
    if not status.details or not status.details[0].Unpack(info):
        return ""
    assert info.domain == "mili"
    return info.reason


async def _judge(call: Call, code: grpc.StatusCode, reason: str, ended: Any) -> None:  # noqa: ANN401
    if code is grpc.StatusCode.OK:
        return
    # Health is the library's own service, and has no details.
    if code is grpc.StatusCode.NOT_FOUND and "grpc.health" in call.method:
        return
    told = f"{code.name} {reason} {await ended.details()!r} to {call}"[:4000]
    assert reason in Reason.__members__, told
    assert Reason(reason) not in NEVER, told
    assert code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED), told


def _channel(address: str) -> aio.Channel:
    # Retries would hide what is answered first.
    return aio.insecure_channel(address, (("grpc.enable_retries", 0),))
