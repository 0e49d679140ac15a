"""When a request must end, however far it is.

Owns the times of every request in one heap, what comes of each, and by when its owner should wake.
Does not know the clock: time is monotonic seconds, passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush

from mili.router.admission import retry_after
from mili.router.errors import Reason
from mili.router.outcome import Finish, FinishReason
from mili.router.request import Request

# Entries of requests that have ended are cleared away when there are twice as many entries as when
# that was last done, or this many.
FEW = 256


class Deadlines:
    """wake_at: called with the time at which somebody should ask due(), whenever that changes."""

    def __init__(self, wake_at: Callable[[float], None]) -> None:
        self._wake_at = wake_at
        self._heap: list[tuple[float, int, Request]] = []
        self._watched = 0
        self._many = FEW

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def next(self) -> float:
        """When something may be due; infinity for never."""
        return self._heap[0][0] if self._heap else math.inf

    def watch(self, request: Request, *times: float) -> None:
        """See that the request is looked at at these times; infinity is never."""
        if len(self._heap) >= self._many:
            self._clear_away()
        before = self.next
        for due in times:
            if due < math.inf:
                self._watched += 1
                heappush(self._heap, (due, self._watched, request))
        if self.next < before:
            self._wake_at(self.next)

    def due(self, now: float) -> Iterator[Request]:
        """Take the requests whose time has come and that have not ended, in order of time."""
        while self._heap and (self._heap[0][0] <= now or self._heap[0][2].finish):
            request = heappop(self._heap)[2]
            if not request.finish:
                yield request
        if self._heap:
            self._wake_at(self.next)

    def _clear_away(self) -> None:
        self._heap = [entry for entry in self._heap if not entry[2].finish]
        heapify(self._heap)
        self._many = max(FEW, 2 * len(self._heap))


def times_of(request: Request) -> tuple[float, float, float]:
    """When a request ends at the latest: as its caller, its time limit and the queue have it."""
    scheduling = request.params.scheduling
    return (
        scheduling.deadline,
        request.submitted_at + scheduling.time_limit,
        request.queued_until,
    )


def end_if_over(request: Request, now: float) -> None:
    """Let a request end if one of its times is over: with what it has, or with an error."""
    deadline, limit, queued_until = times_of(request)
    if now >= deadline:
        request.fail(Reason.DEADLINE_EXCEEDED, "the deadline has passed")
    elif now >= limit:
        request.end(Finish(FinishReason.TIME_LIMIT))
    elif now >= queued_until and request.admitted_at is None:
        waited = now - request.submitted_at
        request.fail(
            Reason.QUEUE_TIMEOUT,
            f"no worker had begun with the request within {waited:.2f} s",
            retry_after=retry_after(waited),
        )
