"""The worker link's protocol: what the frames of workers mean, and when an epoch ends.

Owns epochs, sequence checks and the handshake's order. Does not know sockets, the clock (time is
monotonic seconds, passed in) or requests. A frame of another epoch, out of sequence or of an
unknown sender changes nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog
from google.protobuf.message import DecodeError

from mili.internal.v1.step_pb2 import (
    FAILURE_KIND_GAP,
    FAILURE_KIND_REFUSED,
    Failure,
    Goodbye,
    Heartbeat,
    Hello,
    Ping,
    Prepared,
    Ready,
    RouterFrame,
    StepResult,
    WorkerFrame,
)
from mili.router import handshake
from mili.router.roster import Roster, WorkerInfo
from mili.router.worker_group import WorkerGroup, WorkerState
from mili.router.worker_peer import Send, WorkerPeer

__all__ = ["WorkerEvents", "WorkerGroup", "WorkerInfo", "WorkerState", "Workers"]

log = structlog.get_logger()

MAX_FRAME_BYTES = 16 * 1024 * 1024
# A tick that comes later than this shows that we stood still, and says nothing about workers.
STALL_SECONDS = 0.5
# Before it is ready a worker may be silent for so many times longer: importing and loading can hold
# its interpreter, and no request waits for it.
LOADING_PATIENCE = 10.0
# Frames that no worker of ours can have sent are logged at most this often.
COMPLAINT_SECONDS = 10.0


class WorkerEvents(Protocol):
    """What the engine hears, on the thread that called receive or tick."""

    def on_ready(self, group: WorkerGroup) -> None:
        """The group serves: its limits are known, its tables are empty."""

    def on_result(self, group: WorkerGroup, result: StepResult) -> None:
        """The oldest command in flight of the group is done."""

    def on_prepared(self, group: WorkerGroup, prepared: Prepared) -> None:
        """What the group was asked to prepare is ready, or refused."""

    def on_lost(self, group: WorkerGroup, reason: str, *, died: bool) -> None:
        """The group served and does not any more; nothing in flight will be answered.

        died: it broke down, perhaps because of what it was computing; it did not just lose a frame
        or end when it was told to.
        """


def random_epoch() -> int:
    return 1 + secrets.randbelow(2**64 - 1)


class Workers:
    """Every worker that said Hello, from its Welcome to its loss."""

    def __init__(
        self,
        events: WorkerEvents,
        *,
        interface_sha256: bytes,
        worker_timeout: float = 1.0,
        new_epoch: Callable[[], int] = random_epoch,
    ) -> None:
        self.ignored_frames = 0
        self._events = events
        self._timeout = worker_timeout
        self._new_epoch = new_epoch
        self._roster = Roster(interface_sha256)
        self._epochs: dict[int, WorkerPeer] = {}
        self._transport: Send | None = None
        self._ticked_at: float | None = None
        self._complained_at = float("-inf")

    @property
    def groups(self) -> Sequence[WorkerGroup]:
        """All groups that are known, lost ones included, in the order in which they came."""
        return tuple(self._roster.groups.values())

    def info(self, now: float) -> list[WorkerInfo]:
        """Describe every known worker, lost ones included."""
        return self._roster.info(now)

    def connect(self, transport: Send) -> None:
        """Give frames a way out: the link calls this when its socket is bound."""
        self._transport = transport

    def receive(self, routing_id: bytes, data: bytes, now: float) -> None:
        """Take one frame from the link."""
        frame = _parse(data)
        if frame is None or (frame.HasField("hello") and handshake.malformed(frame.hello)):
            self._complain(len(data), now)
        elif frame.HasField("hello"):
            self._on_hello(routing_id, frame.hello, now)
        elif (peer := self._epochs.get(frame.epoch)) is None:
            self.ignored_frames += 1
        elif missing := peer.missing_before(frame.sequence):
            if missing < 0:
                self.ignored_frames += 1
            else:
                self._end(peer, f"{missing} frames of worker {peer.name} are missing", now)
        else:
            peer.routing_id = routing_id
            peer.liveness.heard(now)
            self._on_frame(peer, frame, now)

    def tick(self, now: float) -> None:
        """Judge every worker; to be called every 100 ms or so, after the socket was drained."""
        late = now - self._ticked_at if self._ticked_at is not None else 0.0
        self._ticked_at = now
        for peer in list(self._epochs.values()):
            if late > STALL_SECONDS:
                peer.liveness.excuse(late, now)
            peer.flush(self._send)
            patience = 1.0 if peer.ready else LOADING_PATIENCE
            problem = peer.liveness.silent(self._timeout * patience, now)
            problem = problem or self._roster.group_of(peer).hung(peer, self._timeout, now)
            if problem:
                self._end(peer, f"worker {peer.name} {problem}", now, gone=True, died=True)
        self._roster.forget_lost(now)

    def _on_frame(self, peer: WorkerPeer, frame: WorkerFrame, now: float) -> None:
        match frame.WhichOneof("body"):
            case "heartbeat":
                self._on_heartbeat(peer, frame.heartbeat, now)
            case "result":
                self._on_result(peer, frame.result, now)
            case "ready":
                self._on_ready(peer, frame.ready, now)
            case "prepared":
                self._on_prepared(peer, frame.prepared)
            case "failure":
                self._on_failure(peer, frame.failure, now)
            case _:
                self.ignored_frames += 1

    def _on_hello(self, routing_id: bytes, hello: Hello, now: float) -> None:
        if problem := self._roster.object_to(hello):
            self._refuse(routing_id, hello, problem)
            return
        old = self._roster.peers.get(hello.worker)
        if old and old.instance != hello.instance:
            self._roster.fence(old)
            reason = (
                f"a newer process has taken over the name {old.name}: give every worker a name of "
                "its own (MILI_NAME)"
            )
            self._dismiss(old, reason, now, died=True)
        elif old and old.epoch:
            self._end(old, f"worker {old.name} says hello again", now, gone=True)
        peer = WorkerPeer(hello, routing_id, now)
        self._roster.add(peer, self._send)
        log.info("worker says hello", worker=peer.name, instance=peer.instance, group=peer.group)
        self._welcome(peer, now)

    def _on_heartbeat(self, peer: WorkerPeer, beat: Heartbeat, now: float) -> None:
        peer.liveness.heartbeat(beat, now)
        if peer.flush(self._send):
            peer.queue(RouterFrame(ping=Ping()))
            peer.flush(self._send)

    def _on_result(self, peer: WorkerPeer, result: StepResult, now: float) -> None:
        if peer.rank != 0:
            return
        group = self._roster.group_of(peer)
        if problem := group.take(result):
            self._end(peer, f"worker {peer.name} {problem}", now)
            return
        peer.liveness.finished(result.step, now)
        self._events.on_result(group, result)

    def _on_prepared(self, peer: WorkerPeer, prepared: Prepared) -> None:
        """A command goes to every rank: none may name what one of them does not have ready."""
        group = self._roster.group_of(peer)
        if group.prepared(peer.rank, prepared):
            self._events.on_prepared(group, prepared)

    def _on_ready(self, peer: WorkerPeer, ready: Ready, now: float) -> None:
        group = self._roster.group_of(peer)
        if peer.ready is not None:
            self._end(peer, f"worker {peer.name} is ready twice", now)
        elif problem := self._roster.object_to_ready(peer, ready):
            log.error("worker refused", worker=peer.name, reason=problem)
            self._dismiss(peer, problem, now)
        else:
            peer.ready = ready
            peer.startup = [(phase.name, phase.seconds) for phase in ready.startup]
            if group.open():
                self._roster.served(peer)
                self._events.on_ready(group)

    def _on_failure(self, peer: WorkerPeer, failure: Failure, now: float) -> None:
        if failure.kind == FAILURE_KIND_GAP:
            self._end(peer, f"frames to worker {peer.name} were lost", now)
        else:
            died = failure.kind != FAILURE_KIND_REFUSED
            reason = f"worker {peer.name} {'failed' if died else 'left'}: {failure.message}"
            self._end(peer, reason, now, gone=True, died=died)

    def _welcome(self, peer: WorkerPeer, now: float) -> None:
        epoch = self._new_epoch()
        self._epochs[epoch] = peer
        peer.open(epoch, now)
        peer.flush(self._send)

    def _end(
        self,
        peer: WorkerPeer,
        reason: str,
        now: float,
        *,
        gone: bool = False,
        died: bool = False,
    ) -> None:
        """End the epoch of a worker's whole group; begin a new one, without it if it is gone."""
        group = self._roster.group_of(peer)
        alive = [rank for rank in group.ranks.values() if rank.epoch]
        for rank in alive:
            del self._epochs[rank.epoch]
            rank.close()
        log.info("worker epoch ends", group=group.name, reason=reason)
        if group.close():
            self._events.on_lost(group, reason, died=died)
        for rank in alive:
            if not (gone and rank is peer):
                self._welcome(rank, now)

    def _dismiss(self, peer: WorkerPeer, reason: str, now: float, *, died: bool = False) -> None:
        """Tell a worker, if it still listens, that it is not wanted."""
        if peer.epoch:
            peer.queue(RouterFrame(goodbye=Goodbye(reason=reason)))
            peer.flush(self._send)
            told = f"worker {peer.name} was dismissed: {reason}"
            self._end(peer, told, now, gone=True, died=died)

    def _refuse(self, routing_id: bytes, hello: Hello, reason: str) -> None:
        log.error("worker refused", worker=hello.worker, reason=reason)
        frame = RouterFrame(goodbye=Goodbye(reason=reason))
        self._send(routing_id, frame.SerializeToString())

    def _complain(self, num_bytes: int, now: float) -> None:
        self.ignored_frames += 1
        if now - self._complained_at >= COMPLAINT_SECONDS:
            self._complained_at = now
            log.warning("frame on the worker link makes no sense", bytes=num_bytes)

    def _send(self, routing_id: bytes, frame: bytes) -> bool:
        return self._transport is not None and self._transport(routing_id, frame)


def _parse(data: bytes) -> WorkerFrame | None:
    if len(data) > MAX_FRAME_BYTES:
        return None
    try:
        return WorkerFrame.FromString(data)
    except DecodeError:
        return None
