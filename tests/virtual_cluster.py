"""An engine over worker groups that only take time, on a clock that jumps from event to event.

Owns the clock, the cost of a step and the record of every call. Does not compute anything: a call's
output has the length that the call was made with, which the router does not know.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any, NamedTuple

from mili.internal.v1.step_pb2 import Sampling, StepCommand, StepResult
from mili.router.engine import Engine
from mili.router.errors import Reason, RequestError
from mili.router.limits import Limits
from mili.router.outcome import FinishReason, RequestOutput
from mili.router.params import ORDINARY, GenerationParams, Scheduling

WORD, EOS = 7, 1
# From the router to a worker, and back: seconds.
LINK_SECONDS = 0.0001

LIMITS = Limits(
    num_blocks=8192,
    block_size=16,
    max_rows=65,
    max_step_tokens=2048,
    max_model_len=8192,
    vocab_size=100,
)


class StepCost(NamedTuple):
    """Seconds of a step. By default about those of Qwen3-8B on an H100 (docs/performance.md)."""

    base: float = 5.5e-3
    per_token: float = 25e-6
    per_context: float = 20e-9

    def seconds(self, command: StepCommand) -> float:
        tokens, context = sum(command.num_tokens), sum(command.starts)
        return self.base + self.per_token * tokens + self.per_context * context


QWEN3_8B = StepCost()


@dataclass
class Call:
    """One call, and what its caller saw of it. Times are of the virtual clock."""

    prompt: list[int]
    output_tokens: int
    scheduling: Scheduling = ORDINARY
    max_tokens: int = 1024
    at: float = 0.0
    token_times: list[float] = field(default_factory=list)
    started_at: float | None = None
    ended_at: float | None = None
    finish: FinishReason | None = None
    error: Reason | None = None
    retry_after: float | None = None

    @property
    def time_to_first_token(self) -> float:
        return self.token_times[0] - self.at if self.token_times else math.inf

    @property
    def latency(self) -> float:
        assert self.ended_at is not None
        return self.ended_at - self.at

    @property
    def completed(self) -> bool:
        return self.finish is not None and self.error is None


class VirtualGroup:
    """A worker group whose steps take what `cost` says and run one after another."""

    weights_sha256 = b"w" * 32

    def __init__(self, name: str, cluster: VirtualCluster, limits: Limits, cost: StepCost) -> None:
        self.name = name
        self.limits = limits
        self.cost = cost
        self.last_step_seconds = math.inf
        self.steps = 0
        self._cluster = cluster
        self._free_at = 0.0
        self._rows: dict[int, tuple[int, int]] = {}
        self._life = 0

    def send(self, command: StepCommand, samples: Sequence[bool], now: float) -> None:
        for admission in command.admissions:
            self._rows[admission.row] = (admission.num_prompt_tokens, admission.sampling.seed)
        batch = zip(command.rows, command.starts, command.num_tokens, samples, strict=True)
        tokens = [
            self._sample(row, start + count) for row, start, count, samples_ in batch if samples_
        ]
        seconds = self.cost.seconds(command)
        self._free_at = max(now + LINK_SECONDS, self._free_at) + seconds
        result = StepResult(
            step=command.step,
            num_new=map(int, samples),
            token_ids=tokens,
            device_microseconds=round(seconds * 1e6),
        )
        life = self._life
        self._cluster.at(self._free_at + LINK_SECONDS, lambda: self._answer(result, seconds, life))

    def lost(self) -> None:
        """Forget everything: nothing that was sent is answered."""
        self._life += 1
        self._rows.clear()
        self._free_at = 0.0
        self.last_step_seconds = math.inf

    def _sample(self, row: int, length: int) -> int:
        num_prompt_tokens, output_tokens = self._rows[row]
        return EOS if length - num_prompt_tokens + 1 >= output_tokens else WORD

    def _answer(self, result: StepResult, seconds: float, life: int) -> None:
        if life == self._life:
            self.steps += 1
            self.last_step_seconds = seconds
            self._cluster.engine.on_result(self, result)  # type: ignore[arg-type]


class VirtualCluster:
    """Calls come in, time passes, and every call has its record."""

    def __init__(
        self,
        groups: int = 1,
        limits: Limits = LIMITS,
        cost: StepCost = QWEN3_8B,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        self.now = 0.0
        self.calls: dict[str, Call] = {}
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = count()
        defaults = {"max_queued_requests": 100_000, "recovery_timeout": 60.0}
        self.engine = Engine(
            model_context_limit=limits.max_model_len,
            pipeline_depth=None,
            make_text=lambda params: None,
            deliver=self._deliver,
            on_fault=lambda error: None,
            clock=lambda: self.now,
            wake_at=self._wake_at,
            **(defaults | settings),
        )
        self.groups = [VirtualGroup(f"w{index}", self, limits, cost) for index in range(groups)]
        for group in self.groups:
            self.join(group)

    def at(self, time: float, event: Callable[[], object]) -> None:
        heappush(self._events, (max(time, self.now), next(self._numbers), event))

    def call(self, time: float, call: Call) -> Call:
        """Let a call come in."""
        self.at(time, lambda: self._submit(call))
        return call

    def run(self, until: float = math.inf) -> None:
        """Let time pass; without a limit until nothing happens any more."""
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heappop(self._events)
            event()
        if until < math.inf:
            self.now = until

    def join(self, group: VirtualGroup) -> None:
        self.engine.on_ready(group)  # type: ignore[arg-type]

    def lose(self, group: VirtualGroup) -> None:
        group.lost()
        self.engine.on_lost(group, "lost by the test", died=True)  # type: ignore[arg-type]

    def _submit(self, call: Call) -> None:
        call.at = self.now
        name = f"c{len(self.calls)}"
        self.calls[name] = call
        params = GenerationParams(
            prompt_token_ids=call.prompt,
            sampling=Sampling(seed=call.output_tokens),
            max_tokens=call.max_tokens,
            eos_token_ids=frozenset({EOS}),
            scheduling=call.scheduling,
        )
        try:
            self.engine.submit(name, params)
        except RequestError as error:
            call.error, call.retry_after, call.ended_at = error.reason, error.retry_after, self.now

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            call = self.calls[output.request_id]
            if output.started is not None:
                call.started_at = self.now
            if output.token_ids:
                call.token_times.append(self.now)
            if output.finished is not None:
                call.ended_at = self.now
                call.finish = output.finished.finish.reason
                if error := output.finished.finish.error:
                    call.error, call.retry_after = error.reason, error.retry_after

    def _wake_at(self, due: float) -> None:
        self.at(due, self.engine.tick)


def poisson(source: random.Random, rate: float, begin: float, end: float) -> Iterator[float]:
    """Times of calls that come independently, `rate` a second."""
    time = begin
    while (time := time + source.expovariate(rate)) < end:
        yield time


def random_call(source: random.Random, scheduling: Scheduling = ORDINARY) -> Call:
    """64 to 448 prompt tokens that nothing shares, 32 to 224 output tokens."""
    prompt = source.choices(range(2, 100), k=source.randint(64, 448))
    return Call(prompt, source.randint(32, 224), scheduling)


def percentile(values: Iterable[float], percent: float) -> float:
    """The value that `percent` of them do not exceed; NaN for none."""
    ranked = sorted(values)
    return ranked[math.ceil(len(ranked) * percent / 100) - 1] if ranked else math.nan
