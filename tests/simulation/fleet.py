"""The fleet: which worker processes there are, and who starts them again.

Owns processes, their machines, and the two promises about their loss: one that is dead is found in
time (I7), and one that nothing befell is not lost. Does not know how faults are chosen.
"""

from __future__ import annotations

import random
from collections import defaultdict
from typing import NamedTuple

from mili.internal.v1.step_pb2 import Hello
from mili.router.workers import WorkerGroup
from tests.simulation.network import LATEST_COPY, Network
from tests.simulation.router_process import INTERFACE, TICK_SECONDS, RouterProcess
from tests.simulation.timeline import Timeline
from tests.simulation.trace import Trace
from tests.simulation.worker_process import MAX_MODEL_LEN, Hardware, WorkerProcess

WEIGHTS = b"w" * 32
# How long after its cause a loss may come: a late copy, the time-out, two ticks, a step's end.
AFTERMATH = LATEST_COPY + 2.0


class Seat(NamedTuple):
    """A worker's place, whichever process holds it."""

    worker: str
    group: str
    rank: int = 0
    world_size: int = 1


class Fleet:
    """Every process that ever ran; `processes` has the newest of each worker's name."""

    def __init__(
        self,
        router: RouterProcess,
        network: Network,
        timeline: Timeline,
        trace: Trace,
        rng: random.Random,
    ) -> None:
        self.processes: dict[str, WorkerProcess] = {}
        self.context_limits: set[int] = set()
        self._router = router
        self._network = network
        self._timeline = timeline
        self._trace = trace
        self._random = rng
        self._seats: dict[str, Seat] = {}
        self._hardware: dict[str, Hardware] = {}
        self._instances = 0
        self._block_size = rng.choice((1, 2, 4))
        # The instance that served last under each worker's name, and those that were replaced.
        # Newer is who said Hello later: a process may be older, and have been cut off until then.
        self._served: dict[str, str] = {}
        self._replaced: set[str] = set()
        # Until when a group's loss has a cause.
        self._troubled: dict[str, float] = defaultdict(float)

    @property
    def alive(self) -> list[WorkerProcess]:
        """The processes that run and hold their name."""
        return [process for process in self.processes.values() if process.is_alive]

    def add_group(self, name: str, world_size: int = 1) -> None:
        """A new group: its processes start at once."""
        for rank in range(world_size):
            worker = name if world_size == 1 else f"{name}.{rank}"
            self._seats[worker] = Seat(worker, name, rank, world_size)
            self.start(worker)

    def start(self, worker: str) -> None:
        """Start a process under a name; one that has it still is in for a surprise."""
        seat, rng = self._seats[worker], self._random
        if worker not in self._hardware or rng.random() < 0.4:
            self._hardware[worker] = self._draw_hardware()
        hardware = self._hardware[worker]
        limit = min(MAX_MODEL_LEN, (hardware.num_blocks - 1) * hardware.block_size)
        self.context_limits.add(limit)
        self.processes[worker] = self._run(self.hello(seat), hardware)

    def start_misfit(self, hello: Hello) -> None:
        """Start a process that no router may take."""
        self._run(hello, self._draw_hardware())

    def hello(self, seat: Seat) -> Hello:
        self._instances += 1
        return Hello(
            protocol_min=1,
            protocol_max=1,
            worker=seat.worker,
            instance=f"{seat.worker}#{self._instances}",
            group=seat.group,
            rank=seat.rank,
            world_size=seat.world_size,
            interface_sha256=INTERFACE,
            weights_sha256=WEIGHTS,
        )

    def trouble(self, group: str, seconds: float) -> None:
        """Something happens to a group that lasts so long: it may be lost for it."""
        until = self._timeline.now + seconds + AFTERMATH
        self._troubled[group] = max(self._troubled[group], until)

    def trouble_all(self, seconds: float) -> None:
        for seat in self._seats.values():
            self.trouble(seat.group, seconds)

    def on_ready(self, group: WorkerGroup) -> None:
        """A group serves: by workers of ours, and none that a newer process has replaced."""
        for peer in group.ranks.values():
            assert peer.name in self._seats, f"{peer.name} serves, and does not fit"
            assert peer.instance not in self._replaced, f"{peer.instance} serves, and is fenced"
            before = self._served.setdefault(peer.name, peer.instance)
            if before != peer.instance:
                self._replaced.add(before)
                self._served[peer.name] = peer.instance

    def on_lost(self, group: WorkerGroup, died: bool) -> None:
        """The router gives a group up: it must have a reason."""
        self._trace.totals["worker losses"] += 1
        self._trace.totals["worker deaths"] += died
        now = self._timeline.now
        assert now <= self._troubled[group.name], f"{group.name} is lost, and nothing befell it"

    @property
    def ranks_agree(self) -> bool:
        """All ranks of each group have finished the same steps."""
        steps = {(process.group, process.finished_step) for process in self.alive}
        return len(steps) == len({group for group, _ in steps})

    def _run(self, hello: Hello, hardware: Hardware) -> WorkerProcess:
        return WorkerProcess(
            hello,
            hardware,
            self._timeline,
            self._network,
            self._trace,
            self._on_exit,
            self._check_stuck,
        )

    def _draw_hardware(self) -> Hardware:
        rng, block_size = self._random, self._block_size
        tokens = rng.choice((36, 40, 48, 80))
        return Hardware(
            num_blocks=1 + tokens // block_size,
            block_size=block_size,
            max_rows=rng.randint(3, 10),
            max_step_tokens=rng.randint(2, 24),
            load_seconds=rng.uniform(0.05, 0.6),
            step_seconds=rng.choice((0.002, 0.04, 0.12)),
            token_seconds=rng.uniform(0.0, 0.004),
        )

    def _on_exit(self, process: WorkerProcess) -> None:
        if process.group not in {seat.group for seat in self._seats.values()}:
            return
        self.trouble(process.group, self._router.settings.worker_timeout)
        self._check_found(process)
        if self.processes.get(process.name) is process:
            delay = self._random.choice((0.05, 0.5, 2.0)) * (1.0 + self._random.random())
            self._timeline.after(delay, self._restart, process)

    def _restart(self, process: WorkerProcess) -> None:
        if self.processes[process.name] is process:
            self.start(process.name)

    def _check_stuck(self, process: WorkerProcess) -> None:
        """I7: a step that does not end is noticed, however slow the machine may be."""
        serving = self._router.serving.get(process.group, ())
        assert process.instance not in serving, f"I7: {process.instance} hangs, and serves"

    def _check_found(self, process: WorkerProcess) -> None:
        """I7: a dead worker is lost soon after the last that was heard of it."""
        router, now = self._router, self._timeline.now
        heard = max(
            process.ended_at, process.connection.to_router.last_arrival, router.stalled_until
        )
        due = heard + router.settings.worker_timeout + 2.5 * TICK_SECONDS
        if now < due:
            self._timeline.at(due, self._check_found, process)
        else:
            serving = router.serving.get(process.group, ())
            assert process.instance not in serving, f"I7: {process.instance} is dead, and serves"
