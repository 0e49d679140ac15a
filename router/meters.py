"""Meters: what happened, counted in plain numbers where it happens.

Owns the counts and the distributions. Does not know Prometheus (metrics.py), nor what is a lot. All
of it is written on the engine's thread; another may read, and sees numbers that were true a moment
ago.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from mili.internal.v1.step_pb2 import StepCommand
from mili.router.errors import Reason
from mili.router.outcome import Finished, FinishReason
from mili.router.request import Request

# Worker groups that are remembered after they were lost. Pods have new names again and again.
MAX_GROUPS = 256

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5)
_LONG_SECONDS = (5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
# Fine around the inter-token latency goals that people set.
_GAP_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.075, 0.1),
    *(0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0),
)
_POWERS_OF_TWO = tuple(float(1 << power) for power in range(18))


class Distribution:
    """A histogram: counts[i] values were at most bounds[i] and above the bound before it."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last one: above every bound
        self.total = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Count a value, `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count


class GroupMeters:
    """What one worker group did: tokens, and its steps in seconds on the device."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.generation_tokens = 0
        self.times_lost = 0
        self.requests_recovered = 0
        self.step_seconds = Distribution(_SECONDS)
        self.step_rows = Distribution(_POWERS_OF_TWO[:13])
        self.step_tokens = Distribution(_POWERS_OF_TWO)

    def sent(self, command: StepCommand) -> None:
        """A step was sent."""
        counts = command.num_tokens
        self.step_rows.add(len(counts))
        self.step_tokens.add(sum(counts))


class Meters:
    """Everything that is counted in one router. Times are in seconds of the engine's clock."""

    def __init__(self) -> None:
        self.groups: dict[str, GroupMeters] = {}
        # By tenant, of requests that have ended.
        self.ended: Counter[tuple[str, FinishReason]] = Counter()
        self.prompt_tokens: Counter[str] = Counter()
        self.generation_tokens: Counter[str] = Counter()
        self.failures: Counter[Reason] = Counter()
        self.queue = Distribution(_SECONDS + _LONG_SECONDS)
        self.time_to_first_token = Distribution(_SECONDS + _LONG_SECONDS)
        self.inter_token = Distribution(_GAP_SECONDS)
        self.prefill = Distribution(_SECONDS + _LONG_SECONDS)
        self.decode = Distribution(_SECONDS + _LONG_SECONDS)
        self.end_to_end = Distribution(_SECONDS + _LONG_SECONDS)
        self.request_prompt_tokens = Distribution(_POWERS_OF_TWO)
        self.request_generation_tokens = Distribution(_POWERS_OF_TWO)

    def group(self, name: str) -> GroupMeters:
        """The meters of a worker group, which keeps them when it is lost and comes back."""
        meters = self.groups.get(name)
        if meters is None:
            if len(self.groups) >= MAX_GROUPS:
                del self.groups[next(iter(self.groups))]
            meters = self.groups[name] = GroupMeters()
        return meters

    def stepped(
        self,
        group: GroupMeters,
        news: Sequence[tuple[Request, int | None]],
        microseconds: int,
        now: float,
    ) -> None:
        """A step is done: `news` are the requests with their new token; None is no token.

        Most streams had their last token from the step before: they wait equally long, and are
        counted together.
        """
        group.step_seconds.add(microseconds / 1e6)
        requests = [request for request, token in news if token is not None]
        group.generation_tokens += len(requests)
        waits = Counter([request.last_token_at for request in requests])
        for last, count in waits.items():
            if last is not None:
                self.inter_token.add(now - last, count)
        if None in waits:
            for request in requests:
                if request.last_token_at is None:
                    self.time_to_first_token.add(now - request.submitted_at)
        for request in requests:
            request.last_token_at = now

    def started(self, group: GroupMeters, request: Request, now: float) -> None:
        """A request was admitted for the first time."""
        self.queue.add(now - request.submitted_at)
        group.prompt_tokens += request.num_prompt_tokens
        group.cached_prompt_tokens += request.num_cached_prompt_tokens

    def finished(self, tenant: str, finished: Finished) -> None:
        """A call has ended, with its last sequence; its times are counted if it got a token."""
        usage, timing = finished.usage, finished.timing
        self.ended[tenant, finished.finish.reason] += 1
        self.prompt_tokens[tenant] += usage.prompt_tokens
        self.generation_tokens[tenant] += usage.completion_tokens
        self.request_prompt_tokens.add(usage.prompt_tokens)
        self.request_generation_tokens.add(usage.completion_tokens)
        self.end_to_end.add(timing.total)
        if usage.completion_tokens:
            self.prefill.add(timing.prefill)
            self.decode.add(timing.decode)

    def lost(self, group: GroupMeters, num_requests: int) -> None:
        """A worker group is gone, and so many requests go on elsewhere."""
        group.times_lost += 1
        group.requests_recovered += num_requests

    def failed(self, reason: Reason) -> None:
        """A call ended with this reason instead of its result."""
        self.failures[reason] += 1
