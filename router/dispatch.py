"""Dispatch: where each live request is, and its way from one place to the next.

A request waits or runs in a worker group, or is with none for want of one, or waits for a sibling
that computes their prompt. Owns the moves between these places. Does not know why requests end, nor
the clock: time is monotonic seconds, passed in. What it returns is to be told to those that
started.
"""

from __future__ import annotations

from collections.abc import Sequence

from mili.router.deadlines import Deadlines
from mili.router.errors import Reason
from mili.router.fair_share import FairShare
from mili.router.fleet import Fleet
from mili.router.ledger import Ledger
from mili.router.outcome import RequestOutput
from mili.router.recovery import Homeless
from mili.router.request import Request
from mili.router.siblings import Siblings


class Dispatch:
    """Every live request is in exactly one place, between two calls."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        shares: FairShare,
        homeless: Homeless,
        siblings: Siblings,
        deadlines: Deadlines,
        ledger: Ledger,
    ) -> None:
        self._fleet = fleet
        self._shares = shares
        self._homeless = homeless
        self._siblings = siblings
        self._deadlines = deadlines
        self._ledger = ledger

    @property
    def num_queued(self) -> int:
        """Live requests that do not run."""
        queued = self._shares.num_waiting + len(self._homeless)
        return queued + self._siblings.num_waiting + self._fleet.num_preparing

    @property
    def num_homeless_tokens(self) -> int:
        """Known tokens of those that are with no group for want of one."""
        return self._homeless.num_tokens

    def position(self, request: Request) -> int:
        """How many go before it in its group; 0 where it does not wait in one."""
        if request.row or request in self._homeless or request in self._siblings:
            return 0
        return self._fleet.pipelines[request.worker].position(request)

    def settle(self, request: Request, name: str | None, now: float) -> None:
        """Let a request wait in a group; with None, until it finds one."""
        if name is None:
            self._deadlines.watch(request, self._homeless.add(request))
            return
        pipeline = self._fleet.pipelines[name]
        request.worker = name
        request.max_length = min(request.max_length, pipeline.scheduler.context_limit)
        pipeline.add(request, now)
        self._fleet.changed(name)
        self._ledger.note(request, now, "placed", name)

    def place(self, requests: Sequence[Request], now: float) -> list[RequestOutput]:
        """Give requests to worker groups; what fits none waits for one.

        Those that were interrupted come before those that never began.
        """
        names: dict[str, None] = {}
        for request in sorted(requests, key=lambda each: (not each.num_admissions, each.arrival)):
            name = self._fleet.place(request)
            self.settle(request, name, now)
            if name is not None:
                names[name] = None
        return [output for name in names for output in self.pump(name, now)]

    def welcome(self, requests: Sequence[Request], now: float) -> list[RequestOutput]:
        """A group takes requests from now on: place these, and those that are with none."""
        return self.place([*requests, *self._homeless.leave()], now)

    def pump(self, name: str, now: float) -> list[RequestOutput]:
        """Keep the pipeline of a group full."""
        self._fleet.changed(name)
        admitted, preempted = self._fleet.pipelines[name].fill(now)
        for request in preempted:
            self._ledger.note(request, now, "preempted", name)
        return self._ledger.started(admitted, now)

    def move(self, name: str, now: float) -> list[RequestOutput]:
        """Place elsewhere what a group that drains can let go."""
        requests = self._fleet.leaving(name)
        for request in requests:
            request.waiting_since = now
            request.leave_worker(Reason.DRAINING)
        return self.place(requests, now) if requests else []

    def drop(self, ended: Sequence[Request], now: float) -> list[RequestOutput]:
        """Requests have ended from outside: use what they leave."""
        names: dict[str, None] = {}
        for request in ended:
            if request in self._siblings:
                self._siblings.remove(request)
            elif request in self._homeless:
                self._homeless.remove(request)
            else:
                self._fleet.pipelines[request.worker].remove(request)
                names[request.worker] = None
        return [output for name in names for output in self.pump(name, now)]

    def release(
        self, news: Sequence[tuple[Request, int | None]], now: float
    ) -> list[RequestOutput]:
        """After a step of a group, before its next: siblings of these may go on.

        A leader without a row was preempted or moved while its token was under way: the prompt is
        not in the cache, but it will be when the leader has come back.
        """
        heirs: list[Request] = []
        for leader, token in news:
            family = self._siblings.led_by(leader)
            if family is None:
                continue
            published = token is not None and leader.row > 0
            if published and self._fleet.is_open(leader.worker):
                for sibling in self._siblings.release(family):
                    sibling.waiting_since = now
                    self.settle(sibling, leader.worker, now)
            elif published or leader.finish is not None:
                heirs.append(self._siblings.succeed(family))
                heirs[-1].waiting_since = now
        return self.place(heirs, now) if heirs else []
