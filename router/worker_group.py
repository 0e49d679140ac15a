"""A worker group: the ranks that together hold one copy of the model.

Owns the commands in flight and what the group as a whole can do. Does not know how ranks come and
go: that is router/workers.py.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from mili.internal.v1.step_pb2 import (
    TASK_EMBED,
    TASK_SCORE,
    WORKER_PHASE_WARMING,
    Admission,
    Prepare,
    Prepared,
    Ready,
    RouterFrame,
    StepCommand,
    StepResult,
)
from mili.router.limits import Limits
from mili.router.liveness import StepTimes, step_work
from mili.router.worker_peer import Send, WorkerPeer

# Far above any pipeline depth: what a worker may be sent without having answered.
MAX_IN_FLIGHT = 16


class WorkerState(IntEnum):
    """Equal in number to mili.v1.WorkerState (a test proves it)."""

    LOADING = 1
    WARMING = 2
    SERVING = 3
    DRAINING = 4  # the engine's decision: a group never says so of itself
    LOST = 6


class _InFlight(NamedTuple):
    step: int
    samples: Sequence[bool]  # [rows]
    work: int


class WorkerGroup:
    """One copy of the model. The same object serves, is lost, and serves again."""

    def __init__(self, name: str, send: Send) -> None:
        self.name = name
        self.world_size = 1
        self.ranks: dict[int, WorkerPeer] = {}
        self.step_times = StepTimes()
        # On the device; unknown, and so not short, until the first result.
        self.last_step_seconds = math.inf
        self._send = send
        self._limits: Limits | None = None
        self._in_flight: deque[_InFlight] = deque()
        # That sample nothing, though the model is read where others sample.
        self._silent_rows: set[int] = set()
        # What is being prepared, by its number: the ranks that have not answered.
        self._preparing: dict[int, set[int]] = {}

    @property
    def state(self) -> WorkerState:
        """The state of the group: it serves only as a whole."""
        states = [self.state_of(peer) for peer in self.ranks.values()]
        alive = [state for state in states if state != WorkerState.LOST]
        if not alive:
            return WorkerState.LOST
        return min(alive) if len(alive) == self.world_size else WorkerState.LOADING

    @property
    def weights_sha256(self) -> bytes:
        """What its ranks say they have loaded."""
        return next(iter(self.ranks.values())).weights_sha256

    @property
    def limits(self) -> Limits:
        assert self._limits is not None, f"group {self.name} does not serve"
        return self._limits

    @property
    def num_in_flight(self) -> int:
        """Commands that were sent and have no result yet."""
        return len(self._in_flight)

    def state_of(self, peer: WorkerPeer) -> WorkerState:
        if not peer.epoch:
            return WorkerState.LOST
        if self._limits is not None:
            return WorkerState.SERVING
        if peer.liveness.phase == WORKER_PHASE_WARMING:
            return WorkerState.WARMING
        return WorkerState.LOADING

    def send(self, command: StepCommand, samples: Sequence[bool], now: float) -> None:
        """Send a command to every rank. What the socket does not take now waits, in order.

        samples: [rows], whether the row must give a token, if it is to generate.
        """
        assert self._limits is not None, f"group {self.name} does not serve"
        assert len(self._in_flight) < MAX_IN_FLIGHT, "more commands in flight than agreed"
        for admission in command.admissions:
            self._admit(admission)
        if silent := self._silent_rows:
            rows = zip(samples, command.rows, strict=True)
            samples = [due and row not in silent for due, row in rows]
        work = step_work(command)
        predicted = self.step_times.predict(work)
        self._in_flight.append(_InFlight(command.step, samples, work))
        frame = RouterFrame(step=command)
        for peer in self.ranks.values():
            peer.liveness.expect(command.step, predicted, now)
            peer.queue(frame)
            peer.flush(self._send)

    def prepare(self, prepare: Prepare) -> None:
        """Ask every rank for what must be ready before a command names it; or release it."""
        if not prepare.release:
            self._preparing[prepare.id] = set(self.ranks)
        for peer in self.ranks.values():
            peer.queue(RouterFrame(prepare=prepare))
            peer.flush(self._send)

    def prepared(self, rank: int, prepared: Prepared) -> bool:
        """A rank answers; whether that settles it: all have it ready, or the first refuses it."""
        unanswered = self._preparing.get(prepared.id)
        if unanswered is None:
            return False
        unanswered.discard(rank)
        if unanswered and not prepared.error:
            return False
        del self._preparing[prepared.id]
        return True

    def _admit(self, admission: Admission) -> None:
        if admission.task in (TASK_EMBED, TASK_SCORE):
            self._silent_rows.add(admission.row)
        else:
            self._silent_rows.discard(admission.row)

    def take(self, result: StepResult) -> str | None:
        """Match a result with the oldest command in flight; return what is wrong with it, if so."""
        if not self._in_flight:
            return f"answered step {result.step}, which nobody asked for"
        sent = self._in_flight[0]
        if result.step != sent.step:
            return f"answered step {result.step} instead of {sent.step}"
        faulty = {fault.index for fault in result.faults}
        due = [samples and row not in faulty for row, samples in enumerate(sent.samples)]
        if list(result.num_new) != due or sum(due) != len(result.token_ids):
            return f"answered step {result.step} with tokens that are not due"
        if max(result.token_ids, default=0) >= self.limits.vocab_size:
            return f"sampled a token outside the vocabulary in step {result.step}"
        if max(faulty, default=0) >= len(due):
            return f"reported a fault outside the batch in step {result.step}"
        self._in_flight.popleft()
        self.last_step_seconds = result.device_microseconds / 1e6
        self.step_times.measured(sent.work, self.last_step_seconds)
        return None

    def open(self) -> bool:
        """Begin to serve if every rank is ready."""
        assert self._limits is None, "opened twice"
        ready = [peer.ready for peer in self.ranks.values() if peer.ready is not None]
        if len(ready) < self.world_size:
            return False
        self._limits = _least(ready)
        return True

    def close(self) -> bool:
        """Forget what is in flight; return whether the group was serving."""
        served = self._limits is not None
        self._limits = None
        self._in_flight.clear()
        self._silent_rows.clear()
        self._preparing.clear()
        return served

    def hung(self, peer: WorkerPeer, timeout: float, now: float) -> str | None:
        """Say so if a rank's step does not move.

        How long it took until then is remembered: if the worker turns out to be only slow, the
        next step like it gets more time, and a slow machine does not lose its worker for ever.
        """
        problem = peer.liveness.hung(timeout, now)
        if problem and self._in_flight:
            self.step_times.measured(self._in_flight[0].work, peer.liveness.standstill(now))
        return problem


def _least(ready: list[Ready]) -> Limits:
    return Limits(
        num_blocks=min(rank.num_blocks for rank in ready),
        block_size=ready[0].block_size,
        max_rows=min(rank.max_rows for rank in ready),
        max_step_tokens=min(rank.max_step_tokens for rank in ready),
        max_model_len=min(rank.max_model_len for rank in ready),
        vocab_size=ready[0].vocab_size,
        capabilities=frozenset.intersection(*(frozenset(rank.capabilities) for rank in ready)),
    )
