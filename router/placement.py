"""Which worker group gets a request: the one that should be done with it first.

Owns the comparison, and where each session was last. Does not know how groups compute, nor which
of them take requests. Exact where it can be, since the router owns every tree: a prefix that is
cached in one group saves its computation there; when waiting for that group would take longer, it
is computed again elsewhere, and from then on cached there, too.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from heapq import heapify, heappop
from typing import NamedTuple

from mili.router.request import Request
from mili.router.scheduler import Scheduler
from mili.router.step_cost import StepSize

# A request is compared by the time until it has so many tokens: a group in which every step is long
# is worse than its queue tells.
COMPARED_OUTPUT_TOKENS = 16
# Seconds that a session rather waits than going to another group.
LOYALTY = 0.2
# Sessions that are remembered; the one that asked least recently is forgotten first.
MAX_SESSIONS = 65_536

Session = tuple[str, str]  # tenant, session id


class Load(NamedTuple):
    """What a request finds before it in a group, and what a token of its prompt costs; seconds."""

    seconds: float
    prompt_token_seconds: float


class Placement:
    """Compares worker groups in time that grows with their number, and with nothing else."""

    def __init__(self) -> None:
        self._loads: dict[str, Load] = {}
        self._groups: OrderedDict[Session, str] = OrderedDict()

    def changed(self, group: str) -> None:
        """Something happened in a group: what was known of its load is out of date."""
        self._loads.pop(group, None)

    def place(
        self, request: Request, schedulers: Mapping[str, Scheduler], context_limit: int
    ) -> str | None:
        """The group that a request should go to; None if it fits none.

        context_limit: the least of the schedulers'.
        Where no group has room for all that the request may generate, one that has room for some: a
        worker may come back with a smaller pool than the one that the request was admitted for.
        """
        for length in (request.max_length, len(request.token_ids) + 1):
            fitting = schedulers
            if length > context_limit:
                fitting = {
                    name: scheduler
                    for name, scheduler in schedulers.items()
                    if length <= scheduler.context_limit
                }
            if fitting:
                group = self._best(request, fitting)
                self._remember(request, group)
                return group
        return None

    def _best(self, request: Request, schedulers: Mapping[str, Scheduler]) -> str:
        """The least loaded come first: where the load alone costs more than the best, no tree is
        searched.
        """
        last_group = self._last_group(request)
        order: list[tuple[float, int, str]] = []
        for index, (name, scheduler) in enumerate(schedulers.items()):
            load = self._loads.get(name)
            if load is None:
                load = self._loads[name] = _load(scheduler)
            order.append((load.seconds - LOYALTY * (name == last_group), index, name))
        heapify(order)
        best, least = "", math.inf
        while order and order[0][0] < least:
            seconds, _, name = heappop(order)
            uncached = len(request.token_ids) - schedulers[name].kv.num_cached_tokens(request)
            cost = seconds + uncached * self._loads[name].prompt_token_seconds
            if cost < least:
                best, least = name, cost
        return best

    def _last_group(self, request: Request) -> str | None:
        scheduling = request.params.scheduling
        if not scheduling.session_id:
            return None
        return self._groups.get((scheduling.tenant, scheduling.session_id))

    def _remember(self, request: Request, group: str) -> None:
        scheduling = request.params.scheduling
        if scheduling.session_id:
            session = scheduling.tenant, scheduling.session_id
            self._groups[session] = group
            self._groups.move_to_end(session)
            if len(self._groups) > MAX_SESSIONS:
                self._groups.popitem(last=False)


def _load(scheduler: Scheduler) -> Load:
    pace, num_waiting = scheduler.pace, len(scheduler.waiting)
    prompts = scheduler.num_uncomputed * pace.prompt_token_seconds
    if num_waiting == 0 and len(scheduler.running) == 0:
        return Load(prompts, pace.prompt_token_seconds)
    joining = min(1.0, (scheduler.max_running - len(scheduler.running)) / max(1, num_waiting))
    more = StepSize(num_waiting, scheduler.num_waiting_tokens, 0.0)
    step = pace.stream_seconds + joining * pace.cost.rows_seconds(more)
    steps = COMPARED_OUTPUT_TOKENS + _steps_to_wait(scheduler)
    return Load(prompts + steps * step, pace.prompt_token_seconds)


def _steps_to_wait(scheduler: Scheduler) -> float:
    """Steps until enough of the running requests have ended for one more, behind all that wait.

    A running request ends, on average, once in as many steps as requests have output tokens.
    """
    running = len(scheduler.running)
    if running == 0:
        return 0.0
    rows = running + len(scheduler.waiting) + 1 - scheduler.max_running
    room = scheduler.kv.num_available * scheduler.kv.block_size
    tokens = scheduler.num_waiting_tokens - room
    ends = max(rows, tokens * running / max(1, scheduler.pace.num_known), 0.0)
    return ends * scheduler.pace.mean_output_tokens / running
