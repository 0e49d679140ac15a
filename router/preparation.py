"""Grammars of one worker group: which of them it has ready, and who waits for one.

Owns their numbers, which the group knows them by, and what is released when. Does not know the
scheduler: a request stands here before it stands there. Times are monotonic seconds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from mili.internal.v1.step_pb2 import Grammar, Prepare, Prepared
from mili.router.errors import Reason, RequestError
from mili.router.outcome import Finish, FinishReason
from mili.router.params import Constraint
from mili.router.request import Request
from mili.router.worker_group import WorkerGroup

# Grammars that stay ready though nobody uses them, as the next request may: between so many and
# twice as many, so that it is rarely asked which of them are used.
MAX_UNUSED = 64


class _Waiting(NamedTuple):
    request: Request
    since: float


class Preparation:
    """Of one worker group, from its on_ready to its on_lost."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group
        # In the order in which they were last asked for.
        self._numbers: OrderedDict[Constraint, int] = OrderedDict()
        self._num_prepared = 0
        self._many = 2 * MAX_UNUSED
        # By the number of a grammar that is not ready yet.
        self._waiting: dict[int, dict[str, _Waiting]] = {}

    def __len__(self) -> int:
        """Requests that wait for a grammar."""
        return sum(map(len, self._waiting.values()))

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._waiting.get(request.grammar, ())

    @property
    def num_tokens(self) -> int:
        """Known tokens of those who wait."""
        waiting = (each for line in self._waiting.values() for each in line.values())
        return sum(len(each.request.token_ids) for each in waiting)

    def is_ready(self, request: Request, now: float) -> bool:
        """Whether the group can begin with a request; else it waits here until it can."""
        constraint = request.params.constraint
        if constraint is None:
            return True
        number = self._numbers.get(constraint)
        if number is None:
            number = self._prepare(constraint)
        self._numbers.move_to_end(constraint)
        request.grammar = number
        if number in self._waiting:
            self._waiting[number][request.request_id] = _Waiting(request, now)
            return False
        return True

    def finish(self, prepared: Prepared, now: float) -> list[Request]:
        """The group answers: returns who waited; those whose grammar it refused have failed."""
        waiting = self._waiting.pop(prepared.id, {})
        if prepared.error:
            # The next request asks again: perhaps of a worker that has been mended.
            refused = (known for known, number in self._numbers.items() if number == prepared.id)
            for constraint in list(refused):
                del self._numbers[constraint]
            # Ranks that did not refuse it have it ready.
            self._group.prepare(Prepare(id=prepared.id, release=True))
        for request, since in waiting.values():
            request.grammar_seconds += now - since
            if prepared.error:
                error = RequestError(
                    Reason.GRAMMAR_INVALID,
                    f"the worker refused the grammar: {prepared.error}",
                    field="generation.structured_output",
                )
                request.end(Finish(FinishReason.ERROR, error=error))
        return [each.request for each in waiting.values()]

    def remove(self, request: Request) -> None:
        del self._waiting[request.grammar][request.request_id]

    def leave(self) -> list[Request]:
        """All who wait: they go elsewhere."""
        requests = [each.request for line in self._waiting.values() for each in line.values()]
        for line in self._waiting.values():
            line.clear()
        return requests

    @property
    def is_full(self) -> bool:
        """Whether so many grammars are ready that those that nobody uses should be released."""
        return len(self._numbers) > self._many

    def release_unused(self, users: Iterable[Request]) -> None:
        """users: every request that was begun or may begin, but for those who wait here."""
        used = {request.grammar for request in users} | self._waiting.keys()
        for constraint, number in list(self._numbers.items()):
            if len(self._numbers) <= MAX_UNUSED:
                break
            if number not in used:
                del self._numbers[constraint]
                self._group.prepare(Prepare(id=number, release=True))
        self._many = 2 * max(MAX_UNUSED, len(self._numbers))

    def _prepare(self, constraint: Constraint) -> int:
        self._num_prepared += 1
        number = self._numbers[constraint] = self._num_prepared
        self._waiting[number] = {}
        kind, source, start_after = constraint
        grammar = Grammar(kind=kind, source=source, start_after_token_ids=start_after)
        self._group.prepare(Prepare(id=number, grammar=grammar))
        return number
