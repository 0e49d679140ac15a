"""The worker's end of the link: a thread that owns a ZeroMQ DEALER.

Owns the socket, its thread and the hand-over between it and the step loop. Does not know what
frames mean (session.py) or how steps are executed. The only file that imports zmq here.

Results and commands pass between the two threads through SimpleQueues; how many commands may wait
is bounded by the router, which sends no more than its pipeline depth ahead of the results.
"""

from __future__ import annotations

import contextlib
import math
import queue
import socket
import threading
import time
from collections.abc import Callable

import structlog
import zmq

from mili.internal.v1.step_pb2 import Failure, Hello, Ready, StepResult
from mili.worker.progress import Progress
from mili.worker.session import Dismissed, Event, Session
from mili.worker.worker_keys import WorkerKeys

log = structlog.get_logger()

HEARTBEAT_SECONDS = 0.1
HIGH_WATER_MARK = 1000
MAX_FRAME_BYTES = 16 * 1024 * 1024
# ZeroMQ's own heartbeat, in milliseconds: it only clears away connections that are half open.
CONNECTION_HEARTBEAT = 1000
CONNECTION_TIMEOUT = 5000
# ZeroMQ gives an address up for good when the handshake fails there, and keeps to what a name once
# resolved to: after so long without an answer, begin afresh.
RECONNECT_SECONDS = 3.0
# A signal may come to a thread that is not the main one, which then handles it when it next wakes.
SIGNAL_SECONDS = 0.2
# How long the last frames get when the worker ends.
FAREWELL_SECONDS = 0.5


class Connection:
    """receive, send and close are the step loop's; everything else runs on the own thread."""

    def __init__(
        self,
        router: str,
        hello: Hello,
        progress: Progress,
        *,
        keys: WorkerKeys | None = None,
        on_serving: Callable[[bool], None] = lambda serving: None,
    ) -> None:
        """on_serving hears, on the connection's thread, whether the router can use this worker.

        Raises ValueError for an address that ZeroMQ does not take.
        """
        self._session = Session(hello, time.monotonic())
        self._progress = progress
        self._on_serving = on_serving
        self._serving = False
        self._inbox: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[tuple[int, Ready | StepResult | Failure]] = (
            queue.SimpleQueue()
        )
        self._interruption: Exception | None = None
        self._closing = threading.Event()
        # A byte through this pair wakes the thread from its poll.
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._router = router
        self._keys = keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._poller.register(self._woken.fileno(), zmq.POLLIN)
        self._connect()
        self._thread = threading.Thread(target=self._run, name="connection", daemon=True)
        self._thread.start()

    def receive(self) -> Event:
        """Wait for the next event of the current epoch."""
        while True:
            try:
                event = self._inbox.get(timeout=SIGNAL_SECONDS)
            except queue.Empty:
                continue
            if self._interruption is not None:
                raise self._interruption
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Dismissed) or event.epoch == self._session.epoch:
                return event

    @property
    def epoch(self) -> int:
        """The open epoch, or 0."""
        return self._session.epoch

    def send(self, epoch: int, body: Ready | StepResult | Failure) -> None:
        """Send a frame, if its epoch is still open when its turn comes."""
        self._outbox.put((epoch, body))
        self._wake_up()

    def stop(self, reason: str) -> None:
        """Let receive return Dismissed(reason) once what waits is received. Signal-safe."""
        self._inbox.put(Dismissed(reason))

    def interrupt(self, error: Exception) -> None:
        """Let receive raise the error, whatever else waits."""
        self._interruption = error
        self._inbox.put(error)

    def close(self) -> None:
        """Send what is queued, as far as the router takes it soon, and end the thread."""
        self._closing.set()
        self._wake_up()
        self._thread.join()

    def _connect(self) -> None:
        self._connected_at = time.monotonic()
        self._socket = _make_socket(self._context, self._keys)
        try:
            self._socket.connect(self._router)
        except zmq.ZMQError as error:
            self._close_sockets()
            raise ValueError(
                f"router {self._router} is not an address: {error.strerror}"
            ) from error

    def _reconnect_if_unanswered(self, now: float) -> None:
        unanswered = self._session.unanswered_hellos > 1
        if unanswered and now - self._connected_at > RECONNECT_SECONDS:
            self._poller.unregister(self._socket)
            self._socket.close()
            self._connect()

    def _wake_up(self) -> None:
        # A full pipe is as good as one byte: the thread will wake. None is left when it has died.
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            log.exception("connection failed")
            self._inbox.put(error)
        finally:
            self._tell_serving(False)
            self._close_sockets()

    def _serve(self) -> None:
        next_beat = time.monotonic()
        ends_at = float("inf")
        while time.monotonic() < ends_at:
            blocked = zmq.POLLOUT if self._session.outgoing else 0
            self._poller.register(self._socket, zmq.POLLIN | blocked)
            self._poller.poll(math.ceil(max(0.0, next_beat - time.monotonic()) * 1000))
            # Looked at before the outbox: what was sent before close is taken along.
            closing = self._closing.is_set()
            self._drain_wake()
            self._receive_frames()
            self._take_outbox()
            now = time.monotonic()
            if now >= next_beat:
                self._session.tick(self._progress.heartbeat(now), now)
                next_beat = now + HEARTBEAT_SECONDS
                self._reconnect_if_unanswered(now)
            self._flush()
            self._tell_serving(self._session.is_ready)
            if closing:
                ends_at = min(ends_at, now + FAREWELL_SECONDS)
                if not self._session.outgoing:
                    return

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(self._woken.recv(4096)) == 4096:
                pass

    def _receive_frames(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                frame = self._socket.recv(zmq.DONTWAIT)
                event = self._session.receive(frame, time.monotonic())
                if event is not None:
                    self._inbox.put(event)

    def _take_outbox(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._session.send(*self._outbox.get_nowait())

    def _flush(self) -> None:
        with contextlib.suppress(zmq.Again):
            while self._session.outgoing:
                self._socket.send(self._session.outgoing[0], zmq.DONTWAIT)
                self._session.outgoing.popleft()

    def _tell_serving(self, serving: bool) -> None:
        if serving != self._serving:
            self._serving = serving
            self._on_serving(serving)

    def _close_sockets(self) -> None:
        self._socket.close(linger=int(FAREWELL_SECONDS * 1000))
        self._context.term()
        self._wake.close()
        self._woken.close()


def _make_socket(
    context: zmq.Context[zmq.Socket[bytes]], keys: WorkerKeys | None
) -> zmq.Socket[bytes]:
    link = context.socket(zmq.DEALER)
    # Without a connection nothing is queued: a router that comes late hears one Hello, not sixty.
    link.setsockopt(zmq.IMMEDIATE, 1)
    link.setsockopt(zmq.LINGER, 0)
    link.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    link.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    link.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    link.setsockopt(zmq.RECONNECT_IVL, 100)
    link.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    link.setsockopt(zmq.IPV6, 1)
    link.setsockopt(zmq.HEARTBEAT_IVL, CONNECTION_HEARTBEAT)
    link.setsockopt(zmq.HEARTBEAT_TIMEOUT, CONNECTION_TIMEOUT)
    if keys:
        link.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        link.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        link.setsockopt(zmq.CURVE_SERVERKEY, keys.router)
    return link
