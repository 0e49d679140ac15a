"""The books: which requests live, what each was told, and what happened to it.

Owns the outputs that leave the engine. Does not know where requests run, or why things happen.
"""

from __future__ import annotations

from mili.router.introspection import Explanation
from mili.router.journal import Journal
from mili.router.meter import Meter
from mili.router.meters import Meters
from mili.router.request import Finished, FinishReason, Request, RequestOutput, Started


class Ledger:
    """Live requests by id. Times are monotonic seconds."""

    def __init__(self, meters: Meters) -> None:
        self.meter = Meter()
        self._meters = meters
        self._requests: dict[str, Request] = {}
        self._journal = Journal()

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def get(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    def open(self, request: Request) -> None:
        """A request lives from now on, until an output of it has `finished`."""
        self._requests[request.request_id] = request

    def note(self, request: Request, now: float, kind: str, detail: str = "") -> None:
        """Write down what happened to a request."""
        self._journal.note(request, now, kind, detail)

    def explain(self, request_id: str, now: float, position: int) -> Explanation | None:
        """Tell the story of a request; None for one that is not remembered."""
        request = self._requests.get(request_id)
        if request is None:
            return self._journal.explain_ended(request_id)
        return self._journal.explain(request, now, position)

    def started(self, request: Request, now: float) -> RequestOutput:
        """What to tell a request that was admitted for the first time."""
        request.admitted_at = now
        usage = request.usage
        self._meters.started(self._meters.group(request.worker), request, now)
        self.meter.prompt(usage.prompt_tokens, usage.cached_prompt_tokens, now)
        cached = f"{usage.cached_prompt_tokens} of {usage.prompt_tokens} prompt tokens cached"
        why = f"; the next block: {request.cache_miss.value}" if request.cache_miss else ""
        self.note(request, now, "started", cached + why)
        start = Started(usage.prompt_tokens, usage.cached_prompt_tokens)
        return RequestOutput(request.request_id, started=start)

    def output(self, request: Request, token: int | None, now: float) -> RequestOutput:
        """What to tell a request after a step; the last output takes it off the books."""
        token_ids: tuple[int, ...] = () if token is None else (token,)
        if request.forced:
            token_ids, request.forced = token_ids + request.forced, ()
        if token_ids and request.first_token_at is None:
            request.first_token_at = now
        started = finished = None
        if request.finish is not None:
            finished = Finished(request.finish, request.usage, request.timing(now))
            if request.finish.reason is FinishReason.TIME_LIMIT and request.admitted_at is None:
                started = Started(request.num_prompt_tokens, 0)
            self._meters.finished(request.params.scheduling.tenant, finished)
            self._journal.end(request, now)
            del self._requests[request.request_id]
        return RequestOutput(
            request.request_id,
            token_ids=token_ids,
            text=request.text.take() if request.text else "",
            first_token_index=request.num_output_tokens - len(token_ids),
            started=started,
            finished=finished,
        )
