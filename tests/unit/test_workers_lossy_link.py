"""Both ends of the worker link over a network that drops, doubles and delays frames.

Invariant I5: whatever the network does, what a worker executes within one epoch is what the router
sent in that epoch, from the first command on, in order, without a hole and without a repetition;
and once the network behaves, work goes on.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque

import pytest

from mili.internal.v1 import step_pb2 as pb
from mili.router.workers import WorkerGroup, Workers
from mili.worker.session import Command, Dismissed, Opened, Session
from tests.scripted_worker import INTERFACE, READY, make_hello, make_result

TICK = 0.02


class Network:
    """Frames of both directions, each with the time of its arrival."""

    def __init__(self, rng: random.Random, fault_rate: float) -> None:
        self.fault_rate = fault_rate
        self.faults: Counter[str] = Counter()
        self._rng = rng
        self._frames: dict[str, list[tuple[float, int, bytes]]] = {"router": [], "worker": []}
        self._count = 0

    def send(self, to: str, frame: bytes, now: float) -> None:
        fault = "none"
        if self._rng.random() < self.fault_rate:
            fault = self._rng.choice(["dropped", "doubled", "delayed", "long delayed"])
            self.faults[fault] += 1
        delays = {"dropped": [], "doubled": [0.0, 0.03], "delayed": [0.05], "long delayed": [2.5]}
        for delay in delays.get(fault, [0.0]):
            self._count += 1
            self._frames[to].append((now + delay, self._count, frame))

    def arrived(self, to: str, now: float) -> list[bytes]:
        frames = sorted(self._frames[to])
        self._frames[to] = [entry for entry in frames if entry[0] > now]
        return [frame for due, _, frame in frames if due <= now]


class Router:
    """Keeps two commands in flight; each carries the life of the group that it belongs to."""

    def __init__(self, network: Network) -> None:
        self.now = 0.0
        self.lives = 0
        self.lost: Counter[str] = Counter()
        self.num_results = 0
        self.workers = Workers(self, interface_sha256=INTERFACE)
        self.workers.connect(lambda _, frame: self._send(network, frame))
        self._serving = False
        self._steps = 0
        self._next_result = 1

    def _send(self, network: Network, frame: bytes) -> bool:
        network.send("worker", frame, self.now)
        return True

    def on_ready(self, group: WorkerGroup) -> None:
        assert not self._serving
        self._serving = True
        self.lives += 1
        self._steps, self._next_result = 0, 1

    def on_result(self, group: WorkerGroup, result: pb.StepResult) -> None:
        assert self._serving
        assert result.step == self._next_result
        assert list(result.num_new) == [1]
        self._next_result += 1
        self.num_results += 1

    def on_lost(self, group: WorkerGroup, reason: str, *, died: bool) -> None:
        assert self._serving
        self._serving = False
        self.lost[" ".join(reason.split()[-2:])] += 1

    def pump(self) -> None:
        for group in self.workers.groups:
            while self._serving and group.num_in_flight < 2:
                self._steps += 1
                command = pb.StepCommand(
                    step=self._steps, rows=[self.lives], starts=[self._steps], num_tokens=[1]
                )
                group.send(command, [True], self.now)


class Worker:
    """Executes what its session hands over, sometimes only later."""

    def __init__(self, rng: random.Random) -> None:
        self.session = Session(make_hello(), 0.0)
        self.executed: dict[int, list[pb.StepCommand]] = defaultdict(list)
        self._inbox: deque[Opened | Command] = deque()
        self._rng = rng
        self._finished = 0

    def receive(self, frames: list[bytes], now: float) -> None:
        for frame in frames:
            event = self.session.receive(frame, now)
            assert not isinstance(event, Dismissed)
            if event is not None:
                self._inbox.append(event)

    def work(self) -> None:
        while self._inbox and self._rng.random() < 0.7:
            event = self._inbox.popleft()
            if event.epoch != self.session.epoch:
                continue
            if isinstance(event, Opened):
                self._finished = 0
                self.session.send(event.epoch, READY)
            else:
                self.executed[event.epoch].append(event.step)
                self._finished = event.step.step
                self.session.send(event.epoch, make_result(event.step.step))

    def heartbeat(self, now: float) -> None:
        phase = pb.WORKER_PHASE_STEPPING if self._inbox else pb.WORKER_PHASE_IDLE
        beat = pb.Heartbeat(finished_step=self._finished, phase=phase)
        self.session.tick(beat, now)


def run(
    seed: int, num_ticks: int, fault_rate: float, calm_ticks: int
) -> tuple[Network, Router, Worker, int]:
    rng = random.Random(seed)
    network = Network(rng, fault_rate)
    router, worker = Router(network), Worker(rng)
    results_in_storm = 0
    for tick in range(num_ticks + calm_ticks):
        router.now = now = tick * TICK
        if tick == num_ticks:
            network.fault_rate = 0.0
        if tick == num_ticks + calm_ticks // 2:
            results_in_storm = router.num_results
        for frame in network.arrived("router", now):
            router.workers.receive(b"dealer", frame, now)
        router.pump()
        worker.receive(network.arrived("worker", now), now)
        worker.work()
        if tick % 5 == 0:
            router.workers.tick(now)
            worker.heartbeat(now)
        while worker.session.outgoing:
            network.send("router", worker.session.outgoing.popleft(), now)
    return network, router, worker, router.num_results - results_in_storm


@pytest.mark.parametrize("fault_rate", [0.002, 0.02, 0.2])
def test_what_is_executed_is_a_run_of_what_was_sent(fault_rate: float) -> None:
    faults: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    for seed in range(12):
        network, router, worker, late_results = run(seed, 1500, fault_rate, calm_ticks=500)
        for commands in worker.executed.values():
            assert len({command.rows[0] for command in commands}) == 1, f"seed {seed}: two lives"
            steps = [command.step for command in commands]
            assert steps == list(range(1, len(steps) + 1)), f"seed {seed}"
        lives = [commands[0].rows[0] for commands in worker.executed.values()]
        assert len(lives) == len(set(lives)), f"seed {seed}: one life in two epochs"
        assert late_results > 50, f"seed {seed}: work does not go on"
        faults += network.faults
        lost += router.lost
    # The gate: every kind of fault happened, and was noticed at both ends.
    assert len(faults) == 4
    assert lost["are missing"] > 3
    assert lost["were lost"] > 3


def test_a_calm_network_loses_nothing() -> None:
    _, router, worker, _ = run(1, 500, 0.0, calm_ticks=100)
    assert router.lost.total() == 0
    assert len(worker.executed) == 1
