"""What happened to each call, for who asks why it is slow.

Owns the events of live calls, and the last words on those that ended. Does not know why things
happen, nor the clock: times are passed in.
"""

from __future__ import annotations

from collections import OrderedDict

from mili.router.introspection import Explanation, RequestEvent, RequestState
from mili.router.outcome import Timing, Usage
from mili.router.request import Request

# Ended calls that are remembered, and events of one call: its first and the latest.
MAX_ENDED = 1000
MAX_EVENTS = 32


class Journal:
    def __init__(self) -> None:
        self._events: dict[str, list[RequestEvent]] = {}
        self._ended: OrderedDict[str, Explanation] = OrderedDict()

    def __len__(self) -> int:
        """Live calls with an event."""
        return len(self._events)

    def note(self, request: Request, now: float, kind: str, detail: str = "") -> None:
        events = self._events.setdefault(request.call_id, [])
        if len(events) == MAX_EVENTS:
            del events[1]
        if request.index:
            detail = f"sequence {request.index}: {detail}"
        events.append(RequestEvent(now, kind, detail))

    def ended(self, request: Request, now: float) -> None:
        """A sequence has ended."""
        assert request.finish is not None
        error = request.finish.error
        self.note(request, now, "ended", error.reason if error else request.finish.reason.name)

    def close(self, last: Request, usage: Usage, timing: Timing) -> None:
        """The last sequence of a call has ended: keep the story for a while."""
        self._ended[last.call_id] = self.explain(last, 0, usage, timing)
        del self._events[last.call_id]
        if len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)

    def explain(self, request: Request, position: int, usage: Usage, timing: Timing) -> Explanation:
        """Tell of a call by one of its sequences, how many go before it, and the call's sums."""
        events = tuple(self._events.get(request.call_id, ()))
        state = _state(request, events[-1].kind if events else "")
        return Explanation(state, position, usage, timing, events)

    def explain_ended(self, call_id: str) -> Explanation | None:
        """Tell of a call that ended, if it is remembered."""
        return self._ended.get(call_id)


def _state(request: Request, last_event: str) -> RequestState:
    if request.finish is not None:
        return RequestState.ENDED
    if request.row:
        decodes = request.num_computed >= request.num_prompt_tokens
        return RequestState.DECODE if decodes else RequestState.PREFILL
    if not request.num_admissions:
        return RequestState.QUEUED
    return RequestState.PREEMPTED if last_event == "preempted" else RequestState.RECOVERING
