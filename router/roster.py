"""Who the workers are: names, instances, ranks and groups.

Owns identity: which worker may join, which instance is the newest, who forms a group with whom.
Does not know epochs, frames or sockets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from mili.internal.v1.step_pb2 import Hello, Ready
from mili.router import handshake
from mili.router.worker_group import WorkerGroup, WorkerState
from mili.router.worker_peer import Send, WorkerPeer

MAX_WORKERS = 1024
# A lost worker stays in the list for so long.
FORGET_SECONDS = 600.0


class WorkerInfo(NamedTuple):
    """One line of AdminService.ListWorkers. Ages in seconds; None: it never happened.

    startup: name and seconds of each part of its start, in order.
    """

    name: str
    instance: str
    state: WorkerState
    heard_age: float
    last_step_age: float | None
    group: str
    rank: int
    world_size: int
    weights_sha256: bytes
    startup: Sequence[tuple[str, float]]


class Roster:
    """Every worker that was let in and not forgotten, lost ones included."""

    def __init__(self, interface_sha256: bytes) -> None:
        self.groups: dict[str, WorkerGroup] = {}
        self.peers: dict[str, WorkerPeer] = {}  # by worker name
        self._interface = interface_sha256
        # Of the first group that served: fixed from then on, or a request could change weights.
        self._weights: bytes | None = None
        # (worker, instance) pairs that a newer instance replaced.
        self._fenced: deque[tuple[str, str]] = deque(maxlen=MAX_WORKERS)

    def group_of(self, peer: WorkerPeer) -> WorkerGroup:
        return self.groups[peer.group]

    def object_to(self, hello: Hello) -> str | None:
        """Return why a worker may not join, if so."""
        if (hello.worker, hello.instance) in self._fenced:
            return (
                f"a newer process has taken over the name {hello.worker}: give every worker a name "
                "of its own (MILI_NAME)"
            )
        if len(self.peers) >= MAX_WORKERS and hello.worker not in self.peers:
            return f"this router has {MAX_WORKERS} workers already"
        group = self.groups.get(hello.group or hello.worker)
        ranks = group.ranks.values() if group else ()
        return handshake.object_to_model(
            hello, self._interface, self._weights
        ) or handshake.object_to_place(hello, ranks)

    def object_to_ready(self, peer: WorkerPeer, ready: Ready) -> str | None:
        """Return why a worker may not serve, if so."""
        if self._weights not in (None, peer.weights_sha256):
            return handshake.OTHER_WEIGHTS
        return handshake.object_to_ready(ready, self.group_of(peer).ranks.values())

    def served(self, peer: WorkerPeer) -> None:
        """The first group to serve decides which weights this router's workers have."""
        self._weights = peer.weights_sha256

    def fence(self, peer: WorkerPeer) -> None:
        """Never let this instance in again."""
        self._fenced.append((peer.name, peer.instance))

    def add(self, peer: WorkerPeer, send: Send) -> None:
        """Put a worker, whose epoch is not open yet, in its place."""
        for old in (self.peers.get(peer.name), self._occupant(peer)):
            if old is not None:
                self.remove(old)
        if peer.group not in self.groups:
            self.groups[peer.group] = WorkerGroup(peer.group, send)
        group = self.groups[peer.group]
        group.world_size = peer.world_size
        group.ranks[peer.rank] = peer
        self.peers[peer.name] = peer

    def remove(self, peer: WorkerPeer) -> None:
        """Forget a worker without an epoch."""
        assert not peer.epoch, "removed a worker that is alive"
        self.peers.pop(peer.name, None)
        group = self.groups.get(peer.group)
        if group and group.ranks.get(peer.rank) is peer:
            del group.ranks[peer.rank]

    def forget_lost(self, now: float) -> None:
        """Drop workers that were lost long ago, and groups that nobody is left of."""
        for peer in list(self.peers.values()):
            if not peer.epoch and now - peer.liveness.heard_at > FORGET_SECONDS:
                self.remove(peer)
        for name in [name for name, group in self.groups.items() if not group.ranks]:
            del self.groups[name]

    def info(self, now: float) -> list[WorkerInfo]:
        return [
            WorkerInfo(
                name=peer.name,
                instance=peer.instance,
                state=self.group_of(peer).state_of(peer),
                heard_age=now - peer.liveness.heard_at,
                last_step_age=peer.liveness.step_age(now),
                group=peer.group,
                rank=peer.rank,
                world_size=peer.world_size,
                weights_sha256=peer.weights_sha256,
                startup=peer.startup,
            )
            for peer in self.peers.values()
        ]

    def _occupant(self, peer: WorkerPeer) -> WorkerPeer | None:
        group = self.groups.get(peer.group)
        return group.ranks.get(peer.rank) if group else None
