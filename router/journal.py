"""What happened to each request, for who asks why it is slow.

Owns the events of live requests, and the last words on those that ended. Does not know why things
happen, nor the clock: times are passed in.
"""

from __future__ import annotations

from collections import OrderedDict

from mili.router.introspection import Explanation, RequestEvent, RequestState
from mili.router.request import Request

# Ended requests that are remembered, and events of one request: its first and the latest.
MAX_ENDED = 1000
MAX_EVENTS = 32


class Journal:
    def __init__(self) -> None:
        self._events: dict[str, list[RequestEvent]] = {}
        self._ended: OrderedDict[str, Explanation] = OrderedDict()

    def __len__(self) -> int:
        """Live requests with an event."""
        return len(self._events)

    def note(self, request: Request, now: float, kind: str, detail: str = "") -> None:
        events = self._events.setdefault(request.request_id, [])
        if len(events) == MAX_EVENTS:
            del events[1]
        events.append(RequestEvent(now, kind, detail))

    def end(self, request: Request, now: float) -> None:
        """The request has ended: keep its story for a while."""
        assert request.finish is not None
        error = request.finish.error
        self.note(request, now, "ended", error.reason if error else request.finish.reason.name)
        self._ended[request.request_id] = self.explain(request, now, 0)
        del self._events[request.request_id]
        if len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)

    def explain(self, request: Request, now: float, position: int) -> Explanation:
        """Tell of a live request. position: how many go before it where it waits."""
        events = tuple(self._events.get(request.request_id, ()))
        state = _state(request, events[-1].kind if events else "")
        return Explanation(state, position, request.usage, request.timing(now), events)

    def explain_ended(self, request_id: str) -> Explanation | None:
        """Tell of a request that ended, if it is remembered."""
        return self._ended.get(request_id)


def _state(request: Request, last_event: str) -> RequestState:
    if request.finish is not None:
        return RequestState.ENDED
    if request.row:
        decodes = request.num_computed >= request.num_prompt_tokens
        return RequestState.DECODE if decodes else RequestState.PREFILL
    if not request.num_admissions:
        return RequestState.QUEUED
    return RequestState.PREEMPTED if last_event == "preempted" else RequestState.RECOVERING
