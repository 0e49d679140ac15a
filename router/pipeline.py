"""One worker group at work: its scheduler's commands go out, its results come back.

Owns how many steps are in flight, and the measure of how fast the group serves. Does not know which
requests come here, or who is told what came of them.
"""

from __future__ import annotations

from mili.internal.v1.step_pb2 import Prepared, StepResult
from mili.router.admission import ServiceRate, estimated_wait
from mili.router.meters import GroupMeters
from mili.router.preparation import Preparation
from mili.router.request import Request
from mili.router.scheduler import Scheduler
from mili.router.worker_group import WorkerGroup

# Steps in flight that hide the way from a result to the next command; more where a step is shorter
# than that way, in seconds, may be.
SHALLOW, DEEP = 2, 3
SHORT_STEP = 0.002


class Pipeline:
    """A worker group from its on_ready to its on_lost. Times are monotonic seconds.

    depth: commands in flight; None for what the length of the steps asks for.
    """

    def __init__(
        self, group: WorkerGroup, scheduler: Scheduler, depth: int | None, meters: GroupMeters
    ) -> None:
        self.group = group
        self.scheduler = scheduler
        self.preparation = Preparation(group)
        self._meters = meters
        self._rate = ServiceRate()
        self._depth = depth
        # More waited than the last step could begin with.
        self._busy = False

    def add(self, request: Request, now: float) -> None:
        """Queue a request, as soon as the worker has all that it needs."""
        if self.preparation.is_ready(request, now):
            self.scheduler.add(request)
        elif self.preparation.is_full:
            scheduler = self.scheduler
            users = (*scheduler.running.values(), *scheduler.waiting.values())
            self.preparation.release_unused(users)

    def prepared(self, prepared: Prepared, now: float) -> list[Request]:
        """The worker has something ready, or refuses it; returns the requests that failed."""
        requests = self.preparation.finish(prepared, now)
        for request in requests:
            if not request.finish:
                self.scheduler.add(request)
        return [request for request in requests if request.finish]

    def remove(self, request: Request) -> None:
        """Forget a request that has ended."""
        if request in self.preparation:
            self.preparation.remove(request)
        else:
            self.scheduler.abort(request)

    def withdraw(self) -> list[Request]:
        """Give up those who wait, and are in no step in flight."""
        return [*self.scheduler.withdraw(), *self.preparation.leave()]

    def evacuate(self, *, died: bool) -> list[Request]:
        """The worker group is gone: returns all requests, as Scheduler.evacuate does."""
        return [*self.scheduler.evacuate(died=died), *self.preparation.leave()]

    def position(self, request: Request) -> int:
        """About how many go before a request that waits here."""
        if request in self.preparation:
            return len(self.scheduler.waiting)
        return self.scheduler.waiting.position(request)

    def fill(self, now: float) -> tuple[list[Request], list[Request]]:
        """Keep the pipeline full; returns who was admitted and who was preempted, in order."""
        scheduler, group = self.scheduler, self.group
        admitted: list[Request] = []
        preempted: list[Request] = []
        if not scheduler.in_flight:
            self._rate.begins(now)
        depth = self._depth or (DEEP if group.last_step_seconds < SHORT_STEP else SHALLOW)
        while len(scheduler.in_flight) < depth:
            command = scheduler.schedule()
            preempted += scheduler.preempted
            self._busy = bool(scheduler.waiting)
            if command is None:
                break
            rows = scheduler.in_flight[-1].rows
            group.send(command, [row.samples for row in rows], now)
            self._meters.sent(command)
            if command.admissions:
                first = {admission.admission for admission in command.admissions}
                admitted += [row.request for row in rows if row.admission in first]
        return admitted, preempted

    def take(self, result: StepResult, now: float) -> list[tuple[Request, int | None]]:
        """The oldest step in flight is done: what came of it, as Scheduler.update says."""
        work = self.scheduler.in_flight[0].size.tokens + len(result.token_ids)
        news = self.scheduler.update(result)
        self._rate.step_done(work, self._busy, now)
        return news

    def estimated_wait(self, request: Request) -> float:
        """Seconds until this group would begin with a request that comes now."""
        return estimated_wait(request, self.scheduler, self._rate, self.group.last_step_seconds)

    @property
    def backlog(self) -> float:
        """Seconds until all that wait have begun; 0 where that is not known."""
        rate = self._rate.per_second
        return self.scheduler.waiting.cost / rate if rate else 0.0
