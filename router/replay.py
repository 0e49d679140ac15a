"""A recording played again: does the scheduler of this version decide the same?

Owns the comparison. Does not know workers: what they answered stands in the recording, except the
tokens, which are as masked as the requests' own.
"""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple

from mili.internal.v1.step_pb2 import TASK_GENERATE, RowFault, StepCommand, StepResult
from mili.router.mask import fields_of
from mili.router.outcome import Finish, FinishReason
from mili.router.recorder import Reel
from mili.router.request import NOTHING, Forced, Request
from mili.router.scheduler import Scheduler
from mili.router.snapshot import Cell, Tokens, thaw
from mili.router.tape import Arrival, Call, Named, StepDone, outcome_of


class Difference(NamedTuple):
    """The first call that came out otherwise. call: from 1."""

    call: int
    name: str
    recorded: str
    replayed: str


class Replayed(NamedTuple):
    group: str
    calls: int
    commands: int
    difference: Difference | None


def replay(reel: Reel) -> Replayed:
    """Make every call again, up to the first difference. Raises ValueError for a damaged reel."""
    stage = _Stage(reel.state)
    commands = 0
    for number, call in enumerate(reel.calls, 1):
        arguments = [stage.argument(value) for value in call.arguments]
        named = {name: stage.argument(value) for name, value in call.named.items()}
        stage.prepare(call)
        try:
            outcome = outcome_of(stage.method(call.name)(*arguments, **named))
        except Exception as error:  # a crash is what many recordings end with
            outcome = f"raised {type(error).__name__}"
        if outcome != call.outcome:
            difference = Difference(number, call.name, _text(call.outcome), _text(outcome))
            return Replayed(reel.group, number, commands, difference)
        commands += isinstance(outcome, bytes)
    return Replayed(reel.group, len(reel.calls), commands, None)


class Ending:
    """In place of a request's text (implements TextOutput): the next token stops it, or not.

    future: every token that the request is going to have.
    """

    num_reasoning_tokens = 0

    def __init__(self, future: array[int]) -> None:
        self.stops_after = -1
        self.forced = NOTHING
        self.future = future

    def push(self, token_id: int, *, may_stop: bool) -> str | Forced | None:
        self.stops_after -= 1
        if self.stops_after == -1:
            return ""
        forced, self.forced = self.forced, NOTHING
        return forced if forced.token_ids else None

    def finish(self, finish: Finish) -> Finish:
        return finish

    def take(self) -> str:
        return ""


class _Stage:
    """The scheduler, its requests, and the tokens that they are going to have."""

    def __init__(self, state: list[Cell]) -> None:
        self._requests: dict[str, Request] = {}  # that have not ended
        self._scheduler = self._enter(state)
        if not isinstance(self._scheduler, Scheduler):
            raise ValueError("the recording does not begin with a scheduler")

    def method(self, name: str) -> Any:  # noqa: ANN401 - any of the scheduler's
        kind, _, method = name.partition(".")
        subjects = {"Scheduler": self._scheduler, "KVCacheManager": self._scheduler.kv}
        if kind not in subjects or method.startswith("_"):
            raise ValueError(f"{name} is no decision")
        return getattr(subjects[kind], method)

    def argument(self, value: object) -> object:
        """What the scheduler is to be called with."""
        match value:
            case Arrival(cells):
                return self._enter(cells)
            case Named(request_id):
                request = self._requests[request_id]
                if request.finish is None:  # it was ended from outside, just before
                    request.end(Finish(FinishReason.CANCELLED))
                return request
            case StepDone():
                return self._result(value)
            case Tokens(ids, length):
                return ids[:length]
        return value

    def prepare(self, call: Call) -> None:
        """Others served tenants meanwhile; and requests stop at their next token if they did."""
        self._scheduler.shares.restore(call.balances)
        for request in self._requests.values():
            request.forced = ()  # its caller was told
        if call.name == "Scheduler.update" and isinstance(call.outcome, list):
            for request_id, reason, num_forced in call.outcome[1:]:
                _prepare(self._requests[request_id], num_forced, stops=reason == "stop")

    def _enter(self, cells: list[Cell]) -> Any:  # noqa: ANN401 - the snapshot's root
        made = thaw(cells)
        for request, cell in zip(made, cells, strict=True):
            if isinstance(request, Request):
                (tokens,) = cells[fields_of(cell)["token_ids"]].items
                request.text = Ending(tokens.ids)
                if request.finish is None:
                    self._requests[request.request_id] = request
        return made[0]

    def _result(self, done: StepDone) -> StepResult:
        rows = self._scheduler.in_flight[0].rows
        due = [
            int(row.samples and index not in done.faults and _generates(row.request))
            for index, row in enumerate(rows)
        ]
        return StepResult(
            step=done.step,
            num_new=due,
            token_ids=[_next(row.request) for row, new in zip(rows, due, strict=True) if new],
            faults=[RowFault(index=index) for index in done.faults],
            device_microseconds=done.microseconds,
        )


def _prepare(request: Request, num_forced: int, *, stops: bool) -> None:
    """Tell a request's text what its next token does."""
    ending, first = _ending(request), len(request.token_ids) + 1
    ending.stops_after = num_forced if stops else -1
    ending.forced = Forced(tuple(ending.future[first : first + num_forced]))


def _ending(request: Request) -> Ending:
    assert isinstance(request.text, Ending)
    return request.text


def _generates(request: Request) -> bool:
    return request.params.task == TASK_GENERATE


def _next(request: Request) -> int:
    """The token that the request got; 0 where nobody looked at it any more."""
    future, known = _ending(request).future, len(request.token_ids)
    return future[known] if known < len(future) else 0


def _text(outcome: object) -> str:
    if isinstance(outcome, bytes):
        return str(StepCommand.FromString(outcome))
    return str(outcome)
