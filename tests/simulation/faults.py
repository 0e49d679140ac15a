"""What goes wrong: faults of processes, connections, frames, strangers and of the router itself.

Owns the kinds of fault, when they come, and which came together. Does not know what follows.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence

from mili.internal.v1.step_pb2 import (
    Heartbeat,
    Ping,
    RouterFrame,
    StepCommand,
    StepResult,
    WorkerFrame,
)
from tests.simulation.fleet import Fleet, Seat
from tests.simulation.network import Wire
from tests.simulation.router_process import RouterProcess
from tests.simulation.timeline import Timeline
from tests.simulation.trace import Trace
from tests.simulation.worker_process import STUCK_SECONDS, WorkerProcess

KINDS = (
    "kill",
    "fail",
    "leave",
    "usurp",
    "hang",
    "freeze",
    "slow",
    "drop",
    "double",
    "delay",
    "reconnect",
    "full",
    "stray",
    "misfit",
    "stall",
    "join",
)
# Two faults met if they came within so many seconds.
TOGETHER = 1.0
# A fault adds nothing to others that were so many seconds ago.
ALONE = 1.5
MAX_JOINS = 2
# Silence that no time-out is short enough to notice.
UNNOTICED = 0.25


class Faults:
    """Draws faults; `pairs` counts the kinds that met."""

    def __init__(
        self,
        fleet: Fleet,
        router: RouterProcess,
        epochs: Sequence[int],
        timeline: Timeline,
        trace: Trace,
        rng: random.Random,
    ) -> None:
        self.pairs: Counter[tuple[str, str]] = Counter()
        self._fleet = fleet
        self._router = router
        self._epochs = epochs
        self._timeline = timeline
        self._trace = trace
        self._random = rng
        self._kinds = rng.sample(KINDS, rng.randint(3, len(KINDS)))
        self._recent: deque[tuple[float, str]] = deque(maxlen=8)
        self._joins = 0
        # Groups that a router may well be patient with.
        self._slowed: set[str] = set()

    def strike(self) -> None:
        """One fault, of one of the kinds of this simulation."""
        alive = self._fleet.alive
        if not alive:
            return
        kind, process = self._random.choice(self._kinds), self._random.choice(alive)
        self._trace.note(f"fault: {kind} at {process.instance}")
        self._trace.totals[f"fault {kind}"] += 1
        self._is_alone = all(self._timeline.now - at > ALONE for at, _ in self._recent)
        for at, other in self._recent:
            if self._timeline.now - at <= TOGETHER:
                self.pairs[min(kind, other), max(kind, other)] += 1
        self._recent.append((self._timeline.now, kind))
        getattr(self, f"_{kind}")(process)

    def _kill(self, process: WorkerProcess) -> None:
        process.kill()

    def _fail(self, process: WorkerProcess) -> None:
        process.fails_next = True

    def _leave(self, process: WorkerProcess) -> None:
        process.stop()

    def _usurp(self, process: WorkerProcess) -> None:
        """Another process starts under a name that is taken."""
        self._fleet.trouble(process.group, 1.0)
        self._fleet.start(process.name)

    def _hang(self, process: WorkerProcess) -> None:
        """The step loop stands still, and the process says that it lives."""
        seconds = self._random.uniform(0.2, 6.0)
        if process.group not in self._slowed and self._random.random() < 0.3:
            seconds = 2.0 * STUCK_SECONDS
        self._slowed.add(process.group)
        self._fleet.trouble(process.group, seconds)
        process.hung_until = self._timeline.now + seconds

    def _freeze(self, process: WorkerProcess) -> None:
        seconds = self._short_or(3.0)
        self._trouble_if_long(process, seconds)
        process.freeze(seconds)

    def _slow(self, process: WorkerProcess) -> None:
        seconds = self._random.uniform(0.5, 3.0)
        self._slowed.add(process.group)
        process.slowness = self._random.choice((3.0, 10.0, 60.0))
        process.slow_until = self._timeline.now + seconds
        self._fleet.trouble(process.group, seconds + 60.0 * process.hardware.step_seconds)

    def _drop(self, process: WorkerProcess) -> None:
        """The next frame or so is lost; heartbeats see to it that there is one."""
        self._fleet.trouble(process.group, 0.2)
        self._either_way(process).dropping_until = self._timeline.now + 0.12

    def _double(self, process: WorkerProcess) -> None:
        """Some frames come twice: no harm, unless there is a Hello among them."""
        serves = process.instance in self._router.serving.get(process.group, ())
        if not serves or not self._is_alone:
            self._fleet.trouble(process.group, 0.5)
        self._either_way(process).doubling_until = self._timeline.now + 0.3

    def _delay(self, process: WorkerProcess) -> None:
        """Frames are held up, and come all at once."""
        seconds = self._short_or(2.0)
        self._trouble_if_long(process, seconds)
        self._either_way(process).stalled_until = self._timeline.now + seconds

    def _reconnect(self, process: WorkerProcess) -> None:
        seconds = self._random.uniform(0.0, 1.5)
        self._fleet.trouble(process.group, seconds)
        process.reconnect(seconds)

    def _full(self, process: WorkerProcess) -> None:
        """The socket takes no more frames for a while."""
        seconds = self._short_or(2.0)
        self._trouble_if_long(process, seconds)
        self._either_way(process).full_until = self._timeline.now + seconds

    def _stray(self, process: WorkerProcess) -> None:
        """Frames that nobody should have sent: they change nothing, so they are no trouble."""
        rng = self._random
        epoch = rng.choice((0, 1, rng.randrange(1 << 64), *self._epochs[-8:]))
        for frame in (
            WorkerFrame(epoch=epoch, result=StepResult(step=1, num_new=[1], token_ids=[1])),
            WorkerFrame(epoch=epoch, heartbeat=Heartbeat(finished_step=3)),
        ):
            self._router.receive(b"stray", frame.SerializeToString())
        self._router.receive(b"stray", rng.randbytes(rng.randint(0, 40)))
        for body in ({"step": StepCommand(step=1, rows=[1])}, {"ping": Ping()}):
            frame_to_worker = RouterFrame(epoch=epoch, **body)  # type: ignore[arg-type]
            process.connection.to_worker.send(frame_to_worker.SerializeToString())

    def _misfit(self, process: WorkerProcess) -> None:
        """A worker of another model, or of another version of mili, comes along."""
        hello = self._fleet.hello(Seat("misfit", "misfit"))
        if self._random.random() < 0.5:
            hello.interface_sha256 = b"x" * 32
        else:
            hello.protocol_min = hello.protocol_max = 2
        self._fleet.start_misfit(hello)

    def _stall(self, process: WorkerProcess) -> None:
        """The router stands still."""
        seconds = self._random.choice((0.3, 0.7, self._random.uniform(0.7, 3.0)))
        if seconds > 0.7 or not self._is_alone:
            self._fleet.trouble_all(seconds)
        self._router.stall(seconds)

    def _join(self, process: WorkerProcess) -> None:
        if self._joins < MAX_JOINS:
            self._joins += 1
            self._fleet.add_group(f"joined{self._joins}")

    def _short_or(self, seconds: float) -> float:
        return self._random.choice((0.1, UNNOTICED, self._random.uniform(UNNOTICED, seconds)))

    def _trouble_if_long(self, process: WorkerProcess, seconds: float) -> None:
        if seconds > UNNOTICED or not self._is_alone:
            self._fleet.trouble(process.group, seconds)

    def _either_way(self, process: WorkerProcess) -> Wire:
        connection = process.connection
        return self._random.choice((connection.to_router, connection.to_worker))
