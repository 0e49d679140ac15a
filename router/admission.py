"""Whether a request may come in: not when it would wait in vain.

Owns the estimate of the wait, and the refusal. Does not know who waits where (queue.py), the clock
(time is monotonic seconds, passed in) or how fast a worker should be: service is measured.
"""

from __future__ import annotations

import math

from mili.router.errors import Reason, RequestError
from mili.router.fair_share import OUTPUT_TOKEN_COST, PROMPT_TOKEN_COST, FairShare
from mili.router.meter import DecayingSum
from mili.router.outcome import FinishReason
from mili.router.request import Request
from mili.router.scheduler import Scheduler

# Seconds of service without which nothing is known.
LEAST_SERVICE = 0.1
# Output tokens of a request, and what one more request changes in what is known of that.
FIRST_OUTPUT_TOKENS = 256.0
LEARNING = 0.02
# A refused client should not ask again before or after so many seconds.
LEAST_RETRY, MOST_RETRY = 0.1, 60.0


class ServiceRate:
    """How much a worker group gets done in a second while more waits than it can begin with.

    While less waits it could do more, and nobody knows how much.
    """

    def __init__(self) -> None:
        # Token costs (fair_share.py) per second; None while nothing is known.
        self.per_second: float | None = None
        self._work = DecayingSum()
        self._seconds = DecayingSum()
        self._since = 0.0

    def begins(self, now: float) -> None:
        """A step begins, and none was in flight."""
        self._since = now

    def step_done(self, work: float, busy: bool, now: float) -> None:
        """A step of so much work is done. busy: more waited than the group could begin with."""
        if busy:
            self._work.add(work, now)
            self._seconds.add(now - self._since, now)
            seconds = self._seconds.value(now)
            if seconds >= LEAST_SERVICE:
                self.per_second = self._work.value(now) / seconds
        self._since = now


class Admission:
    """The door. Times are in seconds.

    max_queue_time: what a request waits that does not say.
    """

    def __init__(self, shares: FairShare, max_queued: int, max_queue_time: float) -> None:
        self._shares = shares
        self.max_queued = max_queued
        self._max_queue_time = max_queue_time
        self._output_tokens = FIRST_OUTPUT_TOKENS
        self._arrivals = 0

    def receive(self, request: Request) -> None:
        """Say whose request it is, when it came, what it may cost, and how long it may wait."""
        scheduling = request.params.scheduling
        request.account = self._shares.account(scheduling.tenant, scheduling.weight)
        self._arrivals += 1
        request.arrival = self._arrivals
        output = min(request.params.max_tokens, self._output_tokens)
        prompt = request.num_prompt_tokens
        request.expected_cost = prompt * PROMPT_TOKEN_COST + output * OUTPUT_TOKEN_COST
        asked = scheduling.max_queue_time
        limit = self._max_queue_time if asked is None else asked
        request.queued_until = request.submitted_at + limit

    def check(self, request: Request, wait: float) -> None:
        """Raise RequestError where a request that waits so long would wait in vain."""
        left = request.params.scheduling.deadline - request.submitted_at
        if left <= 0:
            raise RequestError(Reason.DEADLINE_EXCEEDED, "the deadline had passed on arrival")
        if wait >= left:
            raise RequestError(
                Reason.DEADLINE_UNREACHABLE,
                f"the queue takes about {wait:.2f} s, and the deadline is in {left:.2f} s",
            )
        limit = request.queued_until - request.submitted_at
        if wait > limit:
            raise RequestError(
                Reason.QUEUE_FULL,
                f"the queue takes about {wait:.2f} s, and the request may wait for {limit:.2f} s",
                retry_after=retry_after(wait),
            )

    def queue_full(self, wait: float) -> RequestError:
        """What to tell the one that is too many."""
        message = f"{self.max_queued} requests wait, which is as many as may"
        return RequestError(Reason.QUEUE_FULL, message, retry_after=retry_after(wait))

    def learn(self, request: Request) -> None:
        """Expect the next requests to be a little more like one that has ended."""
        assert request.finish is not None
        if request.finish.reason <= FinishReason.CONTEXT_LENGTH:
            self._output_tokens += LEARNING * (request.num_output_tokens - self._output_tokens)


def estimated_wait(
    request: Request, scheduler: Scheduler, rate: ServiceRate, step_seconds: float
) -> float:
    """Seconds until a worker group would begin with a request; 0 where that is not known.

    Where it has room, only prompts go before this one, a step's worth at a time. Else what is ahead
    of the request must be done, and then its own cost, since on average that is the time from one
    that ends to the next.
    """
    if scheduler.has_room_for(request):
        steps = scheduler.num_waiting_tokens / scheduler.max_step_tokens
        return steps * step_seconds if step_seconds < math.inf else 0.0
    if not rate.per_second:
        return 0.0
    return (scheduler.waiting.cost_ahead(request) + request.expected_cost) / rate.per_second


def retry_after(wait: float) -> float:
    """When a client that was refused should ask again: what was ahead of it is done by then."""
    return min(max(wait, LEAST_RETRY), MOST_RETRY)
