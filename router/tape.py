"""Tape: every decision of one scheduler, the calls into it and what came of them.

Owns what is remembered of a call, and for how long: the state at some moment, and all calls since.
Does not know what the scheduler decides, nor where a tape ends up. It holds references to the
requests' tokens; what leaves the process is masked first (mask.py).
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

from mili.internal.v1.step_pb2 import StepCommand, StepResult
from mili.router.fair_share import Account, Balance, FairShare
from mili.router.outcome import Finish, FinishReason
from mili.router.params import GenerationParams
from mili.router.request import Request
from mili.router.snapshot import Cell, Fields, Tokens, freeze

# Tokens that a tape may keep alive before it begins anew: 16 MiB of them.
MAX_TOKENS = 1 << 22

# What a replay, which knows no text, has to be told.
STOPPED = frozenset(
    {
        FinishReason.EOS,
        FinishReason.STOP_SEQUENCE,
        FinishReason.STOP_TOKEN,
        FinishReason.TOOL_CALLS,
    }
)


class Taped(Protocol):
    """Something whose decisions may be recorded."""

    tape: Tape | None


class Recorded(Taped, Protocol):
    """A scheduler: what else is called from outside, and what others change, too."""

    shares: FairShare

    @property
    def kv(self) -> Taped: ...


_Subject = TypeVar("_Subject", bound=Taped)
_P = ParamSpec("_P")
_T = TypeVar("_T")


def recorded(
    method: Callable[Concatenate[_Subject, _P], _T],
) -> Callable[Concatenate[_Subject, _P], _T]:
    """Put calls from outside on the tape, if there is one; not those from within another."""

    @wraps(method)
    def call(self: _Subject, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        if self.tape is None or self.tape.busy:
            return method(self, *args, **kwargs)
        return self.tape.take(lambda: method(self, *args, **kwargs), method, args, kwargs)

    return call


class Arrival(NamedTuple):
    """A request as it came into the scheduler."""

    cells: list[Cell]


class Named(NamedTuple):
    """A request that the scheduler has seen."""

    request_id: str


class StepDone(NamedTuple):
    """A step's result: which of its tokens were due follows from the step."""

    step: int
    microseconds: int
    faults: tuple[int, ...]


class Call(NamedTuple):
    """name: class and method. arguments: in their order, then those with a name.

    balances: of tenants that others served since the call before. outcome: what a replay has to
    give again.
    """

    name: str
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    balances: dict[str, Balance]
    outcome: Any


class Section(NamedTuple):
    """The state at one moment, and the calls since."""

    state: list[Cell]
    calls: list[Call]


class Tape:
    """The last decisions of `subject`: at least `length`, once there were so many.

    Two sections, so that one is whole when the older is thrown away.
    """

    def __init__(self, subject: Recorded, length: int) -> None:
        self.busy = False
        self._subject = subject
        self._length = length
        self._sections: deque[Section] = deque(maxlen=2)
        self._begin()

    def sections(self) -> list[Section]:
        """What there is now, for whoever writes it down later."""
        return [Section(section.state, section.calls.copy()) for section in self._sections]

    def take(
        self,
        call: Callable[[], _T],
        method: Callable[..., _T],
        args: Sequence[object],
        kwargs: dict[str, object],
    ) -> _T:
        """Make the call, and remember it, also where it raises: then it is the last."""
        arguments = tuple(map(self._describe, args))
        named = {name: self._describe(value) for name, value in kwargs.items()}
        balances = self._foreign_balances()
        outcome: object = None
        self.busy = True
        try:
            result = call()
            outcome = outcome_of(result)
        except Exception as error:
            outcome = f"raised {type(error).__name__}"
            raise
        finally:
            self.busy = False
            self._balances = self._subject.shares.balances()
            self._sections[-1].calls.append(
                Call(method.__qualname__, arguments, named, balances, outcome)
            )
        if len(self._sections[-1].calls) >= self._length or self._num_tokens > MAX_TOKENS:
            self._begin()
        return result

    def _foreign_balances(self) -> dict[str, Balance]:
        now, before = self._subject.shares.balances(), self._balances
        return {tenant: is_now for tenant, is_now in now.items() if before.get(tenant) != is_now}

    def _begin(self) -> None:
        self._num_tokens = 0
        self._balances = self._subject.shares.balances()
        self._sections.append(Section(_frozen(self._subject), []))

    def _describe(self, value: object) -> object:
        match value:
            case Request():
                if value.finish or value.admission:
                    return Named(value.request_id)
                self._num_tokens += len(value.token_ids)
                # Its account is the scheduler's to give.
                return Arrival(_frozen(value, Account))
            case StepResult():
                faults = tuple(fault.index for fault in value.faults)
                return StepDone(value.step, value.device_microseconds, faults)
            case list() | tuple() | array():
                ids = array("I", value)
                return Tokens(ids, len(ids))
            case _:
                assert value is None or isinstance(value, (bool, int, float, str, bytes)), value
                return value


_NOTHING: frozenset[int] = frozenset()


def _request_fields(request: Request) -> Fields:
    """What of a request decides: no text, nothing that was read of it, and why it ended at most."""
    fields = {name: getattr(request, name, None) for name in Request.__slots__}
    fields["text"] = fields["readings"] = None
    fields["forced"] = ()
    fields["finish"] = request.finish and Finish(request.finish.reason)
    return fields


def _params_fields(params: GenerationParams) -> Fields:
    """What of the parameters decides: nothing of what was asked, nor of when it ends."""
    fields = {name: getattr(params, name) for name in GenerationParams.__slots__}
    nothing = {"prompt_token_ids": _NOTHING, "stop_sequences": _NOTHING, "sampling": None}
    nothing |= {"eos_token_ids": _NOTHING, "stop_token_ids": _NOTHING, "constraint": None}
    return fields | nothing


def _frozen(thing: object, *omit: type) -> list[Cell]:
    return freeze(
        thing,
        omit=frozenset({Tape, *omit}),
        fields_of={Request: _request_fields, GenerationParams: _params_fields},
    )


def outcome_of(result: Any) -> object:  # noqa: ANN401 - whatever a decision returns
    """What must come out again: commands whole, of requests which, and of an update who ended."""
    match result:
        case StepCommand():
            return without_content(result).SerializeToString()
        case [Request(), *_]:
            return [request.request_id for request in result]
        case list():
            ended = [
                [request.request_id, _ending(request), len(request.forced)]
                for request, _ in result
                if request.finish or request.forced
            ]
            return [len(result), *ended]
        case _:
            return result


def _ending(request: Request) -> str:
    if request.finish is None:
        return ""
    reason = request.finish.reason
    return "stop" if reason in STOPPED else reason.name.lower()


def without_content(command: StepCommand) -> StepCommand:
    """The decisions in a command, without the tokens and the sampling that it carries."""
    if not command.admissions:
        return command
    bare = StepCommand()
    bare.CopyFrom(command)
    for admission in bare.admissions:
        admission.ClearField("sampling")
        admission.ClearField("token_ids")
    return bare
