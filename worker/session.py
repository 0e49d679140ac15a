"""The worker's side of the link's protocol, without a socket.

Owns the epoch, the sequence numbers of both directions and the moment to say Hello again. Does not
know sockets, threads or the clock (time is monotonic seconds, passed in), nor how a step is
executed. A frame of another epoch or out of sequence executes nothing.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import structlog
from google.protobuf.message import DecodeError

from mili.internal.v1.step_pb2 import (
    FAILURE_KIND_GAP,
    Failure,
    Heartbeat,
    Hello,
    Prepare,
    Prepared,
    Ready,
    RouterFrame,
    StepCommand,
    StepResult,
    Welcome,
    WorkerFrame,
)

log = structlog.get_logger()

PROTOCOL = 1
# After so long without a valid frame the router may have forgotten us.
QUIET_SECONDS = 1.0
# Welcomes that are remembered, so that a late copy of one cannot bring an old epoch back.
MAX_PAST_EPOCHS = 256


class Opened(NamedTuple):
    """A new epoch: the table must be empty, and the router waits for Ready."""

    epoch: int
    welcome: Welcome


class Command(NamedTuple):
    epoch: int
    step: StepCommand


class Dismissed(NamedTuple):
    """The router does not want this worker."""

    reason: str


class Preparing(NamedTuple):
    epoch: int
    prepare: Prepare


Event = Opened | Command | Preparing | Dismissed


class Session:
    """Frames in, events out; frames to send gather in `outgoing`, in order."""

    def __init__(self, hello: Hello, now: float) -> None:
        self.outgoing: deque[bytes] = deque()
        # 0 while there is none: then nothing is executed and nothing but Hello is said.
        self.epoch = 0
        # Ready was said in this epoch.
        self.is_ready = False
        self._hello = WorkerFrame(hello=hello).SerializeToString()
        self._past_epochs: deque[int] = deque(maxlen=MAX_PAST_EPOCHS)
        self._received = 0
        self._sent = 0
        # Since the last Welcome.
        self.unanswered_hellos = 0
        self._greet(now)

    def receive(self, data: bytes, now: float) -> Event | None:
        """Take a frame from the router; return what the step loop must hear of it."""
        try:
            frame = RouterFrame.FromString(data)
        except DecodeError:
            log.warning("frame from the router makes no sense", bytes=len(data))
            return None
        body = frame.WhichOneof("body")
        if body == "welcome":
            return self._open(frame, now)
        if body == "goodbye" and frame.epoch == self.epoch == 0:
            return Dismissed(frame.goodbye.reason)
        if frame.epoch != self.epoch or frame.sequence <= self._received or not self.epoch:
            return None
        if frame.sequence != self._received + 1:
            self._report_gap(now)
            return None
        self._received = frame.sequence
        self._quiet_since = now
        match body:
            case "step":
                return Command(self.epoch, frame.step)
            case "goodbye":
                return Dismissed(frame.goodbye.reason)
            case "prepare":
                return Preparing(self.epoch, frame.prepare)
        return None

    def send(self, epoch: int, body: Ready | StepResult | Failure | Heartbeat | Prepared) -> None:
        """Queue a frame of an epoch; if that is over, nobody waits for it."""
        if not epoch or epoch != self.epoch:
            return
        self._sent += 1
        frame = WorkerFrame(epoch=epoch, sequence=self._sent)
        match body:
            case StepResult():
                frame.result.CopyFrom(body)
            case Heartbeat():
                frame.heartbeat.CopyFrom(body)
            case Ready():
                frame.ready.CopyFrom(body)
                self.is_ready = True
            case Failure():
                frame.failure.CopyFrom(body)
            case Prepared():
                frame.prepared.CopyFrom(body)
        self.outgoing.append(frame.SerializeToString())

    def tick(self, beat: Heartbeat, now: float) -> None:
        """Say that we live, every 100 ms, after everything that came was received."""
        if now - self._quiet_since >= QUIET_SECONDS:
            self._greet(now)
        elif not self.outgoing:
            self.send(self.epoch, beat)

    def _open(self, frame: RouterFrame, now: float) -> Opened | None:
        if frame.sequence != 1 or not frame.epoch or frame.epoch in self._past_epochs:
            return None
        self._leave()
        self.epoch = frame.epoch
        self._past_epochs.append(frame.epoch)
        self._received = 1
        self._sent = 0
        self.unanswered_hellos = 0
        self._quiet_since = now
        log.info("router says welcome")
        return Opened(self.epoch, frame.welcome)

    def _report_gap(self, now: float) -> None:
        log.warning("frames from the router are missing", expected=self._received + 1)
        gap = Failure(kind=FAILURE_KIND_GAP, expected_sequence=self._received + 1)
        self.send(self.epoch, gap)
        self.epoch = 0
        self.is_ready = False
        self._quiet_since = now

    def _greet(self, now: float) -> None:
        self._leave()
        self.outgoing.append(self._hello)
        self._quiet_since = now
        silent = self.unanswered_hellos
        self.unanswered_hellos += 1
        # After 1, 2, 4, 8, ... seconds.
        if silent and silent & (silent - 1) == 0:
            log.warning("router does not answer", seconds=silent * QUIET_SECONDS)

    def _leave(self) -> None:
        self.epoch = 0
        self.is_ready = False
        self.outgoing.clear()
