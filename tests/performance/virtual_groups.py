"""Worker groups on a virtual clock: steps take what a cost model says, and no time at all here.

Owns the clock, the groups and what each request was told when. Does not know what is measured.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mili.internal.v1.step_pb2 import Sampling, StepCommand, StepResult
from mili.router.engine import Engine
from mili.router.limits import Limits
from mili.router.outcome import RequestOutput
from mili.router.params import GenerationParams, Scheduling

CONTEXT_LIMIT = 32_768


class Cost(NamedTuple):
    """Seconds of a step: about Qwen3-8B in bfloat16 on an H100.

    noise: relative standard deviation. Every `slow_every`-th step or so takes twice as long.
    """

    step: float = 5.2e-3
    token: float = 20e-6
    position: float = 49e-9
    pair: float = 1e-9
    noise: float = 0.03
    slow_every: int = 1000

    def seconds(self, command: StepCommand, rng: random.Random) -> float:
        chunks = zip(command.starts, command.num_tokens, strict=True)
        pairs = sum(count * (start + count / 2) for start, count in chunks if count > 1)
        exact = (
            self.step
            + self.token * sum(command.num_tokens)
            + self.position * sum(command.starts)
            + self.pair * pairs
        )
        slow = 2.0 if rng.randrange(self.slow_every) == 0 else 1.0
        return exact * slow * max(0.5, rng.gauss(1.0, self.noise))


QWEN3_8B = Cost()


class VirtualGroup:
    """Executes one command after the other, each as long as it costs."""

    weights_sha256 = b"w" * 32

    def __init__(self, cluster: VirtualCluster, name: str, limits: Limits, cost: Cost) -> None:
        self.name = name
        self.limits = limits
        self.last_step_seconds = math.inf
        self.step_seconds: list[float] = []
        self._cluster = cluster
        self._cost = cost
        self._sent: deque[tuple[StepCommand, Sequence[bool]]] = deque()

    def send(self, command: StepCommand, samples: Sequence[bool], now: float) -> None:
        self._sent.append((command, samples))
        if len(self._sent) == 1:
            self._start()

    def _start(self) -> None:
        seconds = self._cost.seconds(self._sent[0][0], self._cluster.rng)
        self.step_seconds.append(seconds)
        self._cluster.after(seconds, lambda: self._finish(seconds))

    def _finish(self, seconds: float) -> None:
        command, samples = self._sent.popleft()
        if self._sent:
            self._start()
        result = StepResult(
            step=command.step,
            num_new=[int(sample) for sample in samples],
            token_ids=[1] * sum(samples),
            device_microseconds=round(seconds * 1e6),
        )
        self.last_step_seconds = seconds
        self._cluster.call(lambda: self._cluster.engine.on_result(self, result))


@dataclass(slots=True)
class Told:
    """What one request was told, and when, in seconds of the virtual clock."""

    submitted_at: float
    num_prompt_tokens: int
    first_token_at: float = math.nan
    last_token_at: float = math.nan
    gaps: list[float] = field(default_factory=list)
    num_tokens: int = 0
    cached_tokens: int = 0
    worker: str = ""


class VirtualCluster:
    """An engine, its groups, and a clock that jumps from event to event.

    cpu_seconds: what the engine took, callbacks not included; submit_seconds: of it, submit.
    on_end: called with the name of each request that has ended.
    """

    def __init__(self, *, seed: int = 1, itl_goal: float = math.inf, gaps: bool = True) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.told: dict[str, Told] = {}
        self.ended: list[Told] = []
        self.on_end: Callable[[str], None] = lambda name: None
        self.cpu_seconds = self.submit_seconds = 0.0
        self.num_tokens = 0
        self._keep_gaps = gaps
        self._outside = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self.engine = Engine(
            model_context_limit=CONTEXT_LIMIT,
            pipeline_depth=2,
            max_queued_requests=1_000_000,
            recovery_timeout=60.0,
            itl_goal=itl_goal,
            make_text=lambda params: None,
            deliver=self._deliver,
            on_fault=lambda error: None,
            clock=lambda: self.now,
        )

    def join(
        self, name: str, cost: Cost = QWEN3_8B, *, rows: int = 257, kv_tokens: int = 400_000
    ) -> VirtualGroup:
        """A new group serves from now on."""
        limits = Limits(
            num_blocks=kv_tokens // 16 + 1,
            block_size=16,
            max_rows=rows,
            max_step_tokens=8192,
            max_model_len=CONTEXT_LIMIT,
            vocab_size=1000,
        )
        group = VirtualGroup(self, name, limits, cost)
        self.call(lambda: self.engine.on_ready(group))
        return group

    def submit(
        self, name: str, prompt: Sequence[int], max_tokens: int, session_id: str = ""
    ) -> None:
        params = GenerationParams(
            prompt,
            Sampling(seed=1),
            max_tokens,
            scheduling=Scheduling(session_id=session_id),
        )
        self.told[name] = Told(self.now, len(prompt))
        before = self.cpu_seconds
        self.call(lambda: self.engine.submit(name, params))
        self.submit_seconds += self.cpu_seconds - before

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (self.now + seconds, self._num_events, action))

    def run(self, seconds: float = math.inf) -> None:
        """Until so many seconds from now, or until nothing happens any more."""
        until = self.now + seconds
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()
        if math.isfinite(until):
            self.now = until

    def call(self, action: Callable[[], None]) -> None:
        """Call the engine, and count what it takes."""
        started, self._outside = time.thread_time(), 0.0
        action()
        self.cpu_seconds += time.thread_time() - started - self._outside

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        started = time.thread_time()
        for output in outputs:
            self._note(output)
        self._outside += time.thread_time() - started

    def _note(self, output: RequestOutput) -> None:
        told = self.told[output.request_id]
        if output.started:
            told.cached_tokens = output.started.cached_prompt_tokens
        if output.token_ids:
            self.num_tokens += 1
            told.num_tokens += 1
            if told.num_tokens == 1:
                told.first_token_at = self.now
            elif self._keep_gaps:
                told.gaps.append(self.now - told.last_token_at)
            told.last_token_at = self.now
        if output.finished:
            told.worker = output.finished.timing.worker
            self.ended.append(self.told.pop(output.request_id))
            self.after(0.0, lambda: self.on_end(output.request_id))


def quantile(values: Sequence[float], share: float) -> float:
    """The value that so large a share of all does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
