"""The network between router and workers: what ZeroMQ over TCP may do to a frame, and a bit more.

Owns connections, delays and losses. Does not know what a frame means. Within a connection frames
keep their order. A connection that breaks loses what is under way and comes back under another
routing id. A single frame that is lost or doubled is beyond TCP, but not beyond the protocol, whose
sequence numbers are there for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.simulation.timeline import Timeline

Arrive = Callable[[bytes], None]

# A copy of a frame arrives at most so many seconds after it: later than any epoch needs to end.
LATEST_COPY = 2.5


class Wire:
    """One direction of a connection. The faults are set from outside, each until a time."""

    def __init__(
        self, timeline: Timeline, rng: random.Random, latency: float, arrive: Arrive
    ) -> None:
        self.is_open = True
        self.full_until = 0.0
        self.stalled_until = 0.0
        self.dropping_until = 0.0
        self.doubling_until = 0.0
        self._timeline = timeline
        self._random = rng
        self._latency = latency
        self._arrive = arrive
        self.last_arrival = 0.0

    def send(self, frame: bytes) -> bool:
        """Take a frame; False when the queue is full or the peer is away."""
        now = self._timeline.now
        if not self.is_open or now < self.full_until:
            return False
        if now < self.dropping_until:
            return True
        delay = self._latency * (1.0 + self._random.random())
        self.last_arrival = max(self.last_arrival, now + delay, self.stalled_until)
        self._timeline.at(self.last_arrival, self._deliver, frame)
        if now < self.doubling_until:
            late = self._random.choice((0.0, self._random.uniform(0.0, LATEST_COPY)))
            self._timeline.at(self.last_arrival + late, self._arrive, frame)
        return True

    def _deliver(self, frame: bytes) -> None:
        if self.is_open:
            self._arrive(frame)


class Connection:
    """A worker's connection with the router, as long as it holds."""

    def __init__(self, routing_id: bytes, to_router: Wire, to_worker: Wire) -> None:
        self.routing_id = routing_id
        self.to_router = to_router
        self.to_worker = to_worker

    def close(self) -> None:
        """The connection breaks: what is under way is lost."""
        self.to_router.is_open = self.to_worker.is_open = False


class Network:
    """Every connection that there was; the router sends by routing id."""

    def __init__(
        self, timeline: Timeline, rng: random.Random, to_router: Callable[[bytes, bytes], None]
    ) -> None:
        self._timeline = timeline
        self._random = rng
        self._to_router = to_router
        self._connections: dict[bytes, Connection] = {}
        self._count = 0

    def connect(self, arrive: Arrive) -> Connection:
        """A worker connects; `arrive` gets what the router sends to it."""
        self._count += 1
        routing_id = self._count.to_bytes(5, "big")
        latency = self._random.choice((0.0001, 0.0005, 0.005))

        def at_router(frame: bytes) -> None:
            self._to_router(routing_id, frame)

        self._connections[routing_id] = Connection(
            routing_id,
            Wire(self._timeline, self._random, latency, at_router),
            Wire(self._timeline, self._random, latency, arrive),
        )
        return self._connections[routing_id]

    def send_to_worker(self, routing_id: bytes, frame: bytes) -> bool:
        """What the router's socket does: False for a full queue, and for a peer that is away."""
        connection = self._connections.get(routing_id)
        return connection is not None and connection.to_worker.send(frame)
