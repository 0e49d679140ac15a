"""One worker process as the router sees it: who it is, its epoch, and the frames waiting for it.

Owns the sequence numbers of both directions and the order of frames while the socket is full.
Does not know other workers, nor what a frame's body means.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from mili.internal.v1.step_pb2 import Hello, Ready, RouterFrame, Welcome
from mili.router.liveness import Liveness

# (routing id, frame) -> False when the socket is full or the peer is not connected just now.
Send = Callable[[bytes, bytes], bool]


class WorkerPeer:
    """A worker that said Hello. `epoch` is 0 while it has none: then it is lost, or refused."""

    def __init__(self, hello: Hello, routing_id: bytes, now: float) -> None:
        self.name = hello.worker
        self.instance = hello.instance
        self.group = hello.group or hello.worker
        self.rank = hello.rank
        self.world_size = hello.world_size
        self.weights_sha256 = hello.weights_sha256
        # Where to send to: follows the worker when its connection breaks and comes back.
        self.routing_id = routing_id
        self.epoch = 0
        self.ready: Ready | None = None
        # Name and seconds of each part of its start, in order; known once it was ready.
        self.startup: Sequence[tuple[str, float]] = ()
        self.liveness = Liveness(now)
        self._received = 0
        self._sent = 0
        self._waiting: deque[bytes] = deque()

    def open(self, epoch: int, now: float) -> None:
        """Begin an epoch: what the worker was told before is void."""
        self.close()
        self.epoch = epoch
        self.liveness = Liveness(now)
        self._received = self._sent = 0
        self.queue(RouterFrame(welcome=Welcome()))

    def close(self) -> None:
        self.epoch = 0
        self.ready = None
        self._waiting.clear()

    def missing_before(self, sequence: int) -> int:
        """Take a frame's sequence number.

        Returns 0 when it is the next one, a positive number of missing frames before it, or a
        negative number when it was received already.
        """
        missing = sequence - self._received - 1
        if missing == 0:
            self._received = sequence
        return missing

    def queue(self, frame: RouterFrame) -> None:
        """Number a frame and put it behind those that wait already."""
        assert self.epoch, "no frame without an epoch"
        self._sent += 1
        frame.epoch = self.epoch
        frame.sequence = self._sent
        self._waiting.append(frame.SerializeToString())

    def flush(self, send: Send) -> bool:
        """Send what waits, in order, as far as the socket takes it; True when nothing waits."""
        while self._waiting:
            if not send(self.routing_id, self._waiting[0]):
                return False
            self._waiting.popleft()
        return True
