"""Which worker group gets a request: the one that will be done with its prompt first.

Owns the comparison. Does not know how the groups compute. Exact, since the router owns every tree.
"""

from __future__ import annotations

from collections.abc import Mapping

from mili.router.request import Request
from mili.router.scheduler import Scheduler

# A running sequence slows a prompt down by about as much as so many prompt tokens before it.
TOKENS_PER_RUNNING = 16


def place(request: Request, schedulers: Mapping[str, Scheduler]) -> str | None:
    """The group with the least to compute before the request's first token; None if none fits.

    Where no group has room for all that the request may generate, one that has room for some: a
    worker may come back with a smaller pool than the one that the request was admitted for.
    """
    for length in (request.max_length, len(request.token_ids) + 1):
        costs = {
            name: _cost(request, scheduler)
            for name, scheduler in schedulers.items()
            if length <= scheduler.context_limit
        }
        if costs:
            return min(costs, key=costs.__getitem__)
    return None


def _cost(request: Request, scheduler: Scheduler) -> int:
    uncached = len(request.token_ids) - scheduler.kv.num_cached_tokens(request)
    return uncached + scheduler.num_uncomputed + TOKENS_PER_RUNNING * len(scheduler.running)
