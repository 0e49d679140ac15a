"""The step loop's progress, as its heartbeats tell it.

Owns the counters and the declared phase. Written by the step loop, read by the connection's
thread. Does not know the router, nor what a step does.
"""

from __future__ import annotations

import time

from mili.internal.v1.step_pb2 import (
    WORKER_PHASE_IDLE,
    WORKER_PHASE_LOADING,
    WORKER_PHASE_STEPPING,
    Heartbeat,
    WorkerPhase,
)


class Progress:
    """Each field is written by one thread only, so reading them needs no lock."""

    def __init__(self) -> None:
        self.started_step = 0
        self.finished_step = 0
        # One tuple, so that a phase is never read with the time of another.
        self._phase: tuple[WorkerPhase.ValueType, float] = (WORKER_PHASE_LOADING, time.monotonic())

    @property
    def phase(self) -> WorkerPhase.ValueType:
        return self._phase[0]

    def enter(self, phase: WorkerPhase.ValueType) -> None:
        """Declare what the loop does from now on; loading, warming and compiling may take long."""
        self._phase = (phase, time.monotonic())

    def start(self, step: int) -> None:
        self.started_step = step
        self.enter(WORKER_PHASE_STEPPING)

    def finish(self, step: int) -> None:
        self.finished_step = step

    def restart(self) -> None:
        """A new epoch counts its steps from the beginning."""
        self.started_step = self.finished_step = 0

    def heartbeat(self, now: float) -> Heartbeat:
        phase, since = self._phase
        if phase == WORKER_PHASE_STEPPING and self.finished_step >= self.started_step:
            phase = WORKER_PHASE_IDLE
        return Heartbeat(
            started_step=self.started_step,
            finished_step=self.finished_step,
            phase=phase,
            phase_milliseconds=int(max(0.0, now - since) * 1000),
        )
