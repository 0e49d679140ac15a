"""Who waits for a worker group, and who is next.

Owns the order. Does not know rows, blocks or time.

The order of two requests is that of the numbers (-priority, begun before or not, what the tenant
was served, arrival). What a tenant was served changes with every token of it, so requests that
agree in the rest share a lane, sorted by arrival, and only the heads of the lanes are compared: the
next one is found in the time of the number of lanes, however many wait in them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mili.router.fair_share import Account, FairShare
from mili.router.request import Request

Key = tuple[int, int] | tuple[int, str]


class Line:
    """Requests sorted by a key, which stays the same for as long as they stand here."""

    __slots__ = ("_key", "_requests")

    def __init__(self, key: Callable[[Request], Key]) -> None:
        self._key = key
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[str]:
        """Request ids, as a dict would give them."""
        return (request.request_id for request in self._requests)

    @property
    def first(self) -> Request:
        return self._requests[0]

    @property
    def last(self) -> Request:
        return self._requests[-1]

    def values(self) -> list[Request]:
        """The requests, in order, in a list of the caller's own."""
        return self._requests.copy()

    def index(self, request: Request) -> int:
        """How many stand before it."""
        index = bisect_left(self._requests, self._key(request), key=self._key)
        assert self._requests[index] is request
        return index

    def add(self, request: Request) -> None:
        insort(self._requests, request, key=self._key)

    def remove(self, request: Request) -> None:
        del self._requests[self.index(request)]


class Urgency(NamedTuple):
    """Smaller goes first."""

    priority: int  # negative
    fresh: bool  # no worker has begun with it


class _Lane:
    __slots__ = ("account", "cost", "line", "suspect", "urgency")

    def __init__(self, urgency: Urgency, account: Account, suspect: bool) -> None:
        self.urgency = urgency
        self.account = account
        self.suspect = suspect
        self.line = Line(_arrival)
        self.cost = 0.0  # of all in the line, as expected

    @property
    def order(self) -> tuple[Urgency, float, Key]:
        return self.urgency, self.account.served, _arrival(self.line.first)

    def end(self, cost: float = 0.0) -> tuple[Urgency, float]:
        """When, in the order of all, something of this cost behind the line has had its turn."""
        return self.urgency, self.account.served + (self.cost + cost) / self.account.weight

    def cost_before(self, urgency: Urgency, served: float) -> float:
        """What of this lane is served before an account of this urgency has come to `served`."""
        if self.urgency != urgency:
            return self.cost if self.urgency < urgency else 0.0
        return min(self.cost, max(0.0, served - self.account.served) * self.account.weight)


class WaitingQueue:
    """The waiting requests of one worker group. Reads like a dict of them by id."""

    def __init__(self, shares: FairShare) -> None:
        self._shares = shares
        self._lanes: dict[tuple[Urgency, Account, bool], _Lane] = {}
        self._lane_of: dict[str, _Lane] = {}

    def __len__(self) -> int:
        return len(self._lane_of)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._lane_of

    def __iter__(self) -> Iterator[str]:
        return (request.request_id for request in self.values())

    def values(self) -> list[Request]:
        """Every request, in the order that holds now."""
        lanes = self._lanes.values()
        requests = [request for lane in lanes for request in lane.line.values()]
        return sorted(requests, key=_order)

    @property
    def cost(self) -> float:
        """What all that wait are expected to cost."""
        return sum(lane.cost for lane in self._lanes.values())

    def add(self, request: Request) -> None:
        key = (_urgency(request), request.account, request.is_suspect)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane(key[0], request.account, request.is_suspect)
        self._shares.enter(request.account)
        self._lane_of[request.request_id] = lane
        lane.line.add(request)
        lane.cost += request.expected_cost

    def remove(self, request: Request) -> None:
        lane = self._lane_of.pop(request.request_id)
        lane.line.remove(request)
        lane.cost -= request.expected_cost
        self._shares.leave(request.account)
        if not lane.line:
            del self._lanes[lane.urgency, lane.account, lane.suspect]

    def first(self, *, suspects: bool) -> Request | None:
        """Who is next, among all or among those that are no suspects of a worker's death."""
        lanes = (lane for lane in self._lanes.values() if suspects or not lane.suspect)
        lane = min(lanes, key=lambda lane: lane.order, default=None)
        return lane.line.first if lane else None

    def last(self, newcomer: Request) -> Request:
        """Who would be served last if the newcomer waited, too: perhaps itself."""
        urgency, account = _urgency(newcomer), newcomer.account
        ends = {
            lane: lane.end(newcomer.expected_cost if lane.account is account else 0.0)
            for lane in self._lanes.values()
            if lane.urgency >= urgency and lane.urgency.fresh
        }
        served = self._shares.served_on_arrival(account)
        own = (urgency, served + newcomer.expected_cost / account.weight)
        lane = max(ends, key=ends.__getitem__, default=None)
        if lane is None or ends[lane] <= own or (lane.urgency, lane.account) == (urgency, account):
            return newcomer
        return lane.line.last

    def cost_ahead(self, newcomer: Request) -> float:
        """What is expected to be served before the newcomer would be, itself not included."""
        urgency, account = _urgency(newcomer), newcomer.account
        lanes = self._lanes.values()
        own = sum(each.cost for each in lanes if (each.urgency, each.account) == (urgency, account))
        served = self._shares.served_on_arrival(account)
        served += (own + newcomer.expected_cost) / account.weight
        ahead = (
            each.cost if each.account is account else each.cost_before(urgency, served)
            for each in lanes
            if each.urgency <= urgency
        )
        return sum(ahead)

    def position(self, request: Request) -> int:
        """About how many go before it: exactly, where only one tenant waits."""
        own = self._lane_of[request.request_id]
        index = own.line.index(request)
        share = own.cost * index / len(own.line)
        served = own.account.served + share / own.account.weight
        others = (
            len(lane.line) * lane.cost_before(own.urgency, served) / lane.cost
            for lane in self._lanes.values()
            if lane is not own
        )
        return index + round(sum(others))


def _urgency(request: Request) -> Urgency:
    return Urgency(-request.params.scheduling.priority, request.num_admissions == 0)


def _arrival(request: Request) -> Key:
    return request.arrival, request.request_id


def _order(request: Request) -> tuple[Urgency, float, Key]:
    return _urgency(request), request.account.served, _arrival(request)
