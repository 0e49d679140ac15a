"""What becomes of requests whose worker was lost.

Owns those that no worker group can take, and the verdict on those that lose worker after worker.
Does not know worker groups or where requests go next.
"""

from __future__ import annotations

from mili.router.errors import Reason
from mili.router.request import Request

# What a client should wait before it asks again when no worker serves: about a worker's restart.
RETRY_AFTER = 1.0
# Deaths of the worker under a lone suspect, without a token between, that make it the cause.
MAX_STRIKES = 2
# Deaths of its worker that one request may live through.
MAX_DEATHS = 16


def judge(request: Request) -> None:
    """Fail a request that has lost its worker too often."""
    if request.strikes >= MAX_STRIKES:
        request.fail(
            Reason.POISON_REQUEST,
            f"{MAX_STRIKES} workers died while computing this request and no other suspect",
        )
    elif request.total_deaths >= MAX_DEATHS:
        request.fail(
            Reason.WORKER_LOST,
            f"{MAX_DEATHS} workers died while computing this request",
            retry_after=RETRY_AFTER,
        )


class Homeless:
    """Requests without a worker group: their worker was lost and no other serves.

    timeout: seconds that one may wait.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._requests: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._requests

    @property
    def num_tokens(self) -> int:
        return sum(len(request.token_ids) for request in self._requests.values())

    def add(self, request: Request) -> float:
        """Returns the time at which it must have found a worker."""
        self._requests[request.request_id] = request
        return request.waiting_since + self._timeout

    def remove(self, request: Request) -> None:
        del self._requests[request.request_id]

    def leave(self) -> list[Request]:
        """All of them, who have a worker again."""
        requests = list(self._requests.values())
        self._requests.clear()
        return requests

    def give_up(self, request: Request, now: float) -> None:
        """Fail a request that has waited for too long."""
        if now >= request.waiting_since + self._timeout:
            waited = f"its worker was lost, and none took over within {self._timeout:g} s"
            request.fail(Reason.WORKER_LOST, waited, retry_after=RETRY_AFTER)
