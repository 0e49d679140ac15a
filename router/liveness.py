"""Is a worker alive, and does it get on? Liveness is progress, not presence.

Owns how long a step may take and when silence or standstill means that a worker is lost. Does not
know sockets, groups or what becomes of a lost worker. Time is monotonic seconds, passed in.
"""

from __future__ import annotations

from collections import deque

from mili.internal.v1.step_pb2 import (
    WORKER_PHASE_COMPILING,
    WORKER_PHASE_LOADING,
    WORKER_PHASE_WARMING,
    Heartbeat,
    StepCommand,
    WorkerPhase,
)

# Seconds that a step may well take while nothing like it was measured: nobody knows the model and
# the machine yet.
FIRST_STEP_SECONDS = 2.0
# Positions of context that cost as much to attend to as a token costs otherwise.
CONTEXT_PER_TOKEN = 1024
# What a slow step still counts after one more of its size.
DECAY = 0.99
# A step may take this many times what was predicted.
PATIENCE = 5.0

# In these the worker declares that no step can finish: heartbeats are enough.
DECLARED_PHASES = frozenset({WORKER_PHASE_LOADING, WORKER_PHASE_WARMING, WORKER_PHASE_COMPILING})


def step_work(command: StepCommand) -> int:
    """How much a step computes, in tokens without a context."""
    batch = zip(command.starts, command.num_tokens, strict=True)
    return sum(count + count * start // CONTEXT_PER_TOKEN for start, count in batch)


class StepTimes:
    """How long the steps of one worker group take: a decaying maximum for each size of step.

    Sizes are powers of two of the step's work, because a chunk of a prompt and a single decode
    differ by more than any margin would allow for.
    """

    def __init__(self) -> None:
        self._slowest: dict[int, float] = {}

    def measured(self, work: int, seconds: float) -> None:
        size = work.bit_length()
        self._slowest[size] = max(seconds, self._slowest.get(size, 0.0) * DECAY)

    def predict(self, work: int) -> float:
        """Return the seconds that a step may well take."""
        size = work.bit_length()
        if size in self._slowest:
            return self._slowest[size]
        smaller = max((known for known in self._slowest if known < size), default=None)
        if smaller is None:
            return max(FIRST_STEP_SECONDS, *self._slowest.values(), 0.0)
        return max(FIRST_STEP_SECONDS, self._slowest[smaller] * 2.0 ** (size - smaller))


class Liveness:
    """What one worker let us know within one epoch."""

    def __init__(self, now: float) -> None:
        self.heard_at = now
        self.phase: WorkerPhase.ValueType = WORKER_PHASE_LOADING
        self._finished_step = 0
        self._finished_at: float | None = None
        self._moved_at = now
        # (step, predicted seconds), oldest first: sent and not known to be finished.
        self._awaited: deque[tuple[int, float]] = deque()

    def heard(self, now: float) -> None:
        """Any valid frame: the worker's process and the link are there."""
        self.heard_at = now

    def heartbeat(self, beat: Heartbeat, now: float) -> None:
        self.phase = beat.phase
        if self.phase in DECLARED_PHASES:
            self._moved_at = now
        # A beat may still carry the counters of the epoch before: steps not asked for yet.
        asked = self._awaited[-1][0] if self._awaited else 0
        if self._finished_step < beat.finished_step <= asked:
            self.finished(beat.finished_step, now)

    def expect(self, step: int, predicted: float, now: float) -> None:
        """A step was sent: from now, or from the end of the one before it, the clock runs."""
        if not self._awaited:
            self._moved_at = now
        self._awaited.append((step, predicted))

    def finished(self, step: int, now: float) -> None:
        """A result or a heartbeat says that `step` is done."""
        self._finished_step = step
        self._moved_at = self._finished_at = now
        while self._awaited and self._awaited[0][0] <= step:
            self._awaited.popleft()

    def excuse(self, seconds: float, now: float) -> None:
        """We ourselves stood still for `seconds`: they do not count against the worker."""
        self.heard_at = min(now, self.heard_at + seconds)
        self._moved_at = min(now, self._moved_at + seconds)

    def step_age(self, now: float) -> float | None:
        """Return the seconds since a step finished, if one did."""
        return None if self._finished_at is None else now - self._finished_at

    def standstill(self, now: float) -> float:
        """Return the seconds for which a step that should run has not moved."""
        if not self._awaited or self.phase in DECLARED_PHASES:
            return 0.0
        return now - self._moved_at

    def silent(self, timeout: float, now: float) -> str | None:
        """Say so if the worker is. Only after everything it sent was received."""
        silence = now - self.heard_at
        return f"said nothing for {silence:.2f} s" if silence > timeout else None

    def hung(self, timeout: float, now: float) -> str | None:
        """Say so if the worker's step does not move. Only after everything was received."""
        standstill = self.standstill(now)
        if standstill <= timeout or standstill <= PATIENCE * self._awaited[0][1]:
            return None
        return f"did not finish step {self._awaited[0][0]} in {standstill:.2f} s"
