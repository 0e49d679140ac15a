"""The books: which requests live, what each was told, and what happened to it.

Owns the outputs that leave the engine. Does not know where requests run, or why things happen.
"""

from __future__ import annotations

from collections.abc import Iterable

from mili.router.introspection import Explanation
from mili.router.journal import Journal
from mili.router.meter import Meter
from mili.router.meters import Meters
from mili.router.outcome import Finished, FinishReason, RequestOutput, Started
from mili.router.request import Request
from mili.router.siblings import Siblings


class Ledger:
    """Live requests by id. Times are monotonic seconds."""

    def __init__(self, meters: Meters, siblings: Siblings) -> None:
        self.meter = Meter()
        self._meters = meters
        self._siblings = siblings
        self._requests: dict[str, Request] = {}
        self._journal = Journal()

    def __len__(self) -> int:
        return len(self._requests)

    def live(self, call_id: str) -> list[Request]:
        """The sequences of a call that have not ended, in order."""
        if family := self._siblings.get(call_id):
            return [member for member in family.members if member.finish is None]
        request = self._requests.get(call_id)
        return [request] if request else []

    def open(self, request: Request) -> None:
        """A request lives from now on, until an output of its sequence has `finished`."""
        self._requests[request.request_id] = request

    def note(self, request: Request, now: float, kind: str, detail: str = "") -> None:
        """Write down what happened to a request."""
        self._journal.note(request, now, kind, detail)

    def explain(self, request: Request, now: float, position: int) -> Explanation:
        """Tell the story of the call that a live request belongs to."""
        told = self._siblings.get(request.call_id) or request
        return self._journal.explain(request, position, told.usage, told.timing(now))

    def explain_ended(self, call_id: str) -> Explanation | None:
        """Tell the story of a call that has ended; None for one that is not remembered."""
        return self._journal.explain_ended(call_id)

    def started(self, admitted: Iterable[Request], now: float) -> list[RequestOutput]:
        """What to tell those that were admitted now, for the first time or by another worker."""
        outputs: list[RequestOutput] = []
        for request in admitted:
            if request.admitted_at is None:
                request.admitted_at = now
                # The first of a call's sequences is also the first of them that starts.
                if not request.index:
                    outputs.append(self._started(request, now))
            elif request.moved is not None:
                outputs.append(self._recovered(request, now))
        return outputs

    def _started(self, request: Request, now: float) -> RequestOutput:
        usage = request.usage
        self._meters.started(self._meters.group(request.worker), request, now)
        self.meter.prompt(usage.prompt_tokens, usage.cached_prompt_tokens, now)
        cached = f"{usage.cached_prompt_tokens} of {usage.prompt_tokens} prompt tokens cached"
        why = f"; the next block: {request.cache_miss.value}" if request.cache_miss else ""
        self.note(request, now, "started", cached + why)
        start = Started(usage.prompt_tokens, usage.cached_prompt_tokens)
        return RequestOutput(request.request_id, started=start)

    def _recovered(self, request: Request, now: float) -> RequestOutput:
        return RequestOutput(
            request.call_id,
            first_token_index=request.num_output_tokens,
            index=request.index,
            recovery=request.recovered(now),
        )

    def output(self, request: Request, token: int | None, now: float) -> RequestOutput:
        """What to tell a request after a step; the last output takes it off the books."""
        token_ids: tuple[int, ...] = () if token is None else (token,)
        if request.forced:
            token_ids, request.forced = token_ids + request.forced, ()
        if token_ids and request.first_token_at is None:
            request.first_token_at = now
        started = finished = None
        if request.finish is not None:
            finished = self._close(request, now)
            if request.finish.reason is FinishReason.TIME_LIMIT and request.admitted_at is None:
                started = None if request.index else Started(request.num_prompt_tokens, 0)
        text = request.text.take() if request.text else ""
        first = len(request.token_ids) - request.num_prompt_tokens - len(token_ids)
        readings = request.readings
        if readings is not None:
            request.readings = None
        # By position: this is made for every token of everybody.
        return RequestOutput(
            request.call_id, token_ids, text, first, started, finished, request.index, readings
        )

    def _close(self, request: Request, now: float) -> Finished:
        """Take a request that has ended off the books, and with the last one its call."""
        finished = self._siblings.finished(request, now)
        self._journal.ended(request, now)
        if not finished.num_left:
            self._meters.finished(request.params.scheduling.tenant, finished)
            self._journal.close(request, finished.usage, finished.timing)
        del self._requests[request.request_id]
        return finished
