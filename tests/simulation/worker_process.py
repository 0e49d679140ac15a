"""A worker process in virtual time: the real session, a step loop, and the fake worker's KV.

Owns the process's life: loading, stepping, standing still, ending. Does not know why a fault
happens, nor what becomes of its requests. Its two threads are those of worker/connection.py and
worker/main.py: one receives and says that it lives, the other executes what waits, in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from mili.internal.v1.step_pb2 import (
    FAILURE_KIND_INTERNAL,
    FAILURE_KIND_REFUSED,
    WORKER_PHASE_IDLE,
    WORKER_PHASE_LOADING,
    WORKER_PHASE_STEPPING,
    WORKER_PHASE_WARMING,
    Failure,
    Heartbeat,
    Hello,
    Ready,
    RouterFrame,
    StepCommand,
    StepResult,
)
from mili.worker.connection import HEARTBEAT_SECONDS
from mili.worker.session import Command, Dismissed, Event, Opened, Preparing, Session
from tests.fake_worker import EOS, FakeModel, FakeWorker
from tests.simulation.network import Network
from tests.simulation.timeline import Timeline
from tests.simulation.trace import Trace

MAX_MODEL_LEN = 48
# A request with this sampling kills every worker that computes it.
DEADLY_TOP_K = 666
# More frames than ever wait for a socket: the steps of a pipeline, and what says that we live.
MAX_OUTGOING = 24
DRAIN = "stopped"
# Longer than any router waits for a step, if no step before it was slow.
STUCK_SECONDS = 20.0


class Hardware(NamedTuple):
    """What a process finds on its machine, and how fast that is, in seconds."""

    num_blocks: int
    block_size: int
    max_rows: int
    max_step_tokens: int
    load_seconds: float
    step_seconds: float
    token_seconds: float


class WorkerProcess:
    """One process of one worker, until `on_exit` hears of its end.

    on_stuck hears of it when a step has not ended for STUCK_SECONDS.
    """

    def __init__(
        self,
        hello: Hello,
        hardware: Hardware,
        timeline: Timeline,
        network: Network,
        trace: Trace,
        on_exit: Callable[[WorkerProcess], None],
        on_stuck: Callable[[WorkerProcess], None],
    ) -> None:
        self.name = hello.worker
        self.instance = hello.instance
        self.group = hello.group
        self._rank = hello.rank
        self.hardware = hardware
        self.is_alive = True
        self.ended_at = 0.0
        self.frozen_until = 0.0
        self.hung_until = 0.0
        self.slow_until = 0.0
        self.slowness = 1.0
        self.fails_next = False
        self._timeline = timeline
        self._network = network
        self._trace = trace
        self._on_exit, self._on_stuck = on_exit, on_stuck
        self._session = Session(hello, timeline.now)
        self._socket: list[bytes] = []  # arrived while the process stood still
        self._inbox: deque[Event] = deque()
        self._phase = WORKER_PHASE_LOADING
        self._is_loaded = self._is_busy = False
        self._started_step = self.finished_step = 0
        self.connection = network.connect(self._arrive)
        self._beat()

    def reconnect(self, seconds: float) -> None:
        """The connection breaks, and comes back after a while under another routing id."""
        self.connection.close()
        self._timeline.after(seconds, self._connect)

    def freeze(self, seconds: float) -> None:
        """Nothing of the process runs; what arrives waits in its socket."""
        self.frozen_until = max(self.frozen_until, self._timeline.now + seconds)
        self._timeline.at(self.frozen_until, self._drain)

    def stop(self) -> None:
        """SIGTERM: what waits is executed, then the process takes its leave."""
        self._inbox.append(Dismissed(DRAIN))
        self._work()

    def kill(self) -> None:
        """The process is gone; what it has sent may still arrive."""
        if self.is_alive:
            self.connection.to_worker.is_open = False
            self._exit()

    def _exit(self) -> None:
        self.is_alive = False
        self.ended_at = self._timeline.now
        self._trace.note(f"{self.instance} ends")
        self._on_exit(self)

    def _connect(self) -> None:
        if self.is_alive:
            self.connection = self._network.connect(self._arrive)
            self._flush()

    def _arrive(self, frame: bytes) -> None:
        if self.is_alive:
            self._socket.append(frame)
            self._drain()

    def _drain(self) -> None:
        """Receive what is there, as the connection's thread does before it ticks."""
        if not self.is_alive or self._timeline.now < self.frozen_until:
            return
        frames, self._socket = self._socket, []
        for frame in frames:
            self._trace.frame(f"{self.instance} gets", RouterFrame, frame)
            event = self._session.receive(frame, self._timeline.now)
            if event is not None:
                self._inbox.append(event)
        self._flush()
        self._work()

    def _beat(self) -> None:
        if not self.is_alive:
            return
        self._timeline.after(HEARTBEAT_SECONDS, self._beat)
        if self._timeline.now < self.frozen_until:
            return
        beat = Heartbeat(
            started_step=self._started_step, finished_step=self.finished_step, phase=self._phase
        )
        self._session.tick(beat, self._timeline.now)
        self._flush()

    def _flush(self) -> None:
        outgoing = self._session.outgoing
        while outgoing and self.connection.to_router.send(outgoing[0]):
            outgoing.popleft()
        # What other ranks send is not awaited, and so not bounded by the pipeline's depth.
        if self._rank == 0:
            assert len(outgoing) <= MAX_OUTGOING, f"I6: {len(outgoing)} frames wait at {self.name}"

    def _work(self) -> None:
        """The step loop: take the next event that is still of interest, unless one is at work."""
        if self._timeline.now < self.frozen_until:
            return
        while self._inbox and not self._is_busy and self.is_alive:
            event = self._inbox.popleft()
            if isinstance(event, Dismissed):
                self._leave(event)
            elif event.epoch != self._session.epoch:
                continue
            elif isinstance(event, Opened):
                self._open(event.epoch)
            elif isinstance(event, Preparing):
                self._prepare(event)
            else:
                self._start(event)

    def _open(self, epoch: int) -> None:
        if not self._is_loaded:
            self._is_busy = True
            self._timeline.after(self.hardware.load_seconds, self._loaded, epoch)
            return
        hardware = self.hardware
        self._worker = FakeWorker(hardware.num_blocks, hardware.block_size, FakeModel())
        self._deadly: dict[int, bool] = {}
        self._started_step = self.finished_step = 0
        self._phase = WORKER_PHASE_IDLE
        ready = Ready(
            num_blocks=hardware.num_blocks,
            block_size=hardware.block_size,
            max_rows=hardware.max_rows,
            max_step_tokens=hardware.max_step_tokens,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=EOS + 1,
            capabilities=["grammars"],
        )
        self._session.send(epoch, ready)
        self._flush()

    def _loaded(self, epoch: int) -> None:
        if self._stands_still(self._loaded, epoch):
            return
        if self._phase == WORKER_PHASE_LOADING:
            self._phase = WORKER_PHASE_WARMING
            self._timeline.after(self.hardware.load_seconds / 4, self._loaded, epoch)
            return
        self._is_loaded, self._is_busy = True, False
        if epoch == self._session.epoch:
            self._open(epoch)
        self._work()

    def _start(self, event: Command) -> None:
        """Execute a step: its effects are there at once, its result when its time is over."""
        epoch, command = event
        self._is_busy = True
        self._started_step = command.step
        self._phase = WORKER_PHASE_STEPPING
        self._trace.totals["steps"] += 1
        for admission in command.admissions:
            self._deadly[admission.row] = admission.sampling.top_k == DEADLY_TOP_K
        result = self._worker.execute(command)
        result.device_microseconds = int(self._step_seconds(command) * 1e6)
        seconds = result.device_microseconds / 1e6
        self._timeline.after(seconds, self._finish, epoch, command, result)

    def _prepare(self, event: Preparing) -> None:
        """Another thread does it, whatever the step loop does: no row may name it until then."""
        seconds = self.hardware.load_seconds / 8
        self._timeline.after(seconds, self._prepared, event, self._worker)

    def _prepared(self, event: Preparing, worker: FakeWorker) -> None:
        """worker: of the epoch that asked."""
        if self._stands_still(self._prepared, event, worker):
            return
        if answer := worker.prepare(event.prepare):
            self._session.send(event.epoch, answer)
            self._flush()

    def _step_seconds(self, command: StepCommand) -> float:
        slow = self.slowness if self._timeline.now < self.slow_until else 1.0
        work = self.hardware.token_seconds * sum(command.num_tokens)
        return slow * (self.hardware.step_seconds + work)

    def _finish(self, epoch: int, command: StepCommand, result: StepResult) -> None:
        if self._stands_still(self._finish, epoch, command, result):
            return
        if any(self._deadly[row] for row in command.rows):
            self._trace.totals["poisonings"] += 1
            self.kill()
            return
        if self.fails_next:
            self._farewell(Failure(kind=FAILURE_KIND_INTERNAL, step=command.step, message="broken"))
            return
        self._is_busy = False
        self.finished_step = command.step
        self._phase = WORKER_PHASE_IDLE
        self._session.send(epoch, result)
        self._flush()
        self._work()

    def _stands_still(self, action: Callable[..., None], *args: object) -> bool:
        """Whether the step loop is dead or stuck; in the second case it goes on when it is not."""
        until = max(self.frozen_until, self.hung_until)
        if self.is_alive and self._timeline.now < until:
            if until - self._timeline.now > STUCK_SECONDS:
                self._timeline.after(STUCK_SECONDS, self._on_stuck, self)
            self._timeline.at(until, action, *args)
            return True
        return not self.is_alive

    def _leave(self, event: Dismissed) -> None:
        if event.reason == DRAIN:
            self._farewell(Failure(kind=FAILURE_KIND_REFUSED, message=DRAIN))
        else:
            self._exit()

    def _farewell(self, failure: Failure) -> None:
        self._session.send(self._session.epoch, failure)
        self._flush()
        self._exit()
