"""The worker's end of the link: a ZeroMQ DEALER, and a thread that listens to it.

Owns the socket, its thread and the hand-over between it and the step loop. Does not know what
frames mean (session.py) or how steps are executed. The only file that imports zmq here.

Commands pass to the step loop through a SimpleQueue; how many may wait is bounded by the router,
which sends no more than its pipeline depth ahead of the results. A result is sent by the thread
that has it: waking another one first would cost more than all the rest of its way.

Session and socket belong to who holds the lock, which is as good as one thread to ZeroMQ. Hence
nobody may poll the socket itself: the thread waits for its file descriptor. That one tells of what
is new only once, to whoever uses the socket next: so that is the last thing both ask, with the lock
held, and what the other is not told of by then it will be told by the descriptor.
"""

from __future__ import annotations

import contextlib
import math
import queue
import select
import socket
import threading
import time
from collections.abc import Callable

import structlog
import zmq

from mili.internal.v1.step_pb2 import Failure, Hello, Prepared, Ready, StepResult
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
    """send may be called from any thread, receive and close are the step loop's; everything else
    runs on the own thread."""

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
        # Holds session and socket. Nothing waits while it has it.
        self._lock = threading.Lock()
        self._is_closed = False
        self._session = Session(hello, time.monotonic())
        self._progress = progress
        self._on_serving = on_serving
        self._serving = False
        self._inbox: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        self._interruption: Exception | None = None
        self._closing = threading.Event()
        # A byte through this pair wakes the thread from its poll.
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._router = router
        self._keys = keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._connect()
        except ValueError:
            self._close_sockets()
            raise
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

    def send(self, epoch: int, body: Ready | StepResult | Failure | Prepared) -> None:
        """Send a frame, if its epoch is open; what the router does not take now goes later."""
        with self._lock:
            if self._is_closed:
                return
            self._session.send(epoch, body)
            is_new = True
            # The thread meets the same error, and tells the step loop.
            with contextlib.suppress(zmq.ZMQError):
                self._flush()
                is_new = self._can_go_on() or self._session.is_ready != self._serving
        if is_new:
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
            raise ValueError(
                f"router {self._router} is not an address: {error.strerror}"
            ) from error
        self._poll = select.poll()
        self._poll.register(self._woken, select.POLLIN)
        self._poll.register(self._socket, select.POLLIN)  # its descriptor

    def _reconnect_if_unanswered(self, now: float) -> None:
        unanswered = self._session.unanswered_hellos > 1
        if unanswered and now - self._connected_at > RECONNECT_SECONDS:
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
        can_go_on = True
        while time.monotonic() < ends_at:
            seconds = 0.0 if can_go_on else max(0.0, next_beat - time.monotonic())
            self._poll.poll(math.ceil(seconds * 1000))
            closing = self._closing.is_set()
            self._drain_wake()
            with self._lock:
                self._receive_frames()
                now = time.monotonic()
                if now >= next_beat:
                    self._session.tick(self._progress.heartbeat(now), now)
                    next_beat = now + HEARTBEAT_SECONDS
                    self._reconnect_if_unanswered(now)
                self._flush()
                is_ready, is_done = self._session.is_ready, not self._session.outgoing
                can_go_on = self._can_go_on()
            self._tell_serving(is_ready)
            if closing:
                ends_at = min(ends_at, now + FAREWELL_SECONDS)
                if is_done:
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

    def _flush(self) -> None:
        with contextlib.suppress(zmq.Again):
            while self._session.outgoing:
                self._socket.send(self._session.outgoing[0], zmq.DONTWAIT)
                self._session.outgoing.popleft()

    def _can_go_on(self) -> bool:
        """Whether a frame can be received, or a waiting one sent. If not, the descriptor will tell
        when: nobody may use the socket after this without asking again."""
        events = int(self._socket.getsockopt(zmq.EVENTS))
        return bool(events & zmq.POLLIN or (self._session.outgoing and events & zmq.POLLOUT))

    def _tell_serving(self, serving: bool) -> None:
        if serving != self._serving:
            self._serving = serving
            self._on_serving(serving)

    def _close_sockets(self) -> None:
        with self._lock:
            self._is_closed = True
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
