"""Siblings: the sequences of a call that asks for several.

Owns who belongs together, who waits until another has computed their prompt, and the sums that the
caller is told. Does not know worker groups, blocks or text, nor what anybody is told.

One sequence leads: it computes the prompt, and the others wait here. When the prompt's full blocks
are in its group's cache they follow it there, and compute one block each at most (invariant 7 of
the design: there is no copy on write). Where the leader cannot give them its cache, because it
failed alone or its group takes nobody any more, the next one leads.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from dataclasses import replace

from mili.internal.v1.step_pb2 import Sampling
from mili.router.fair_share import PROMPT_TOKEN_COST
from mili.router.outcome import Finished, Timing, Usage
from mili.router.request import Request

_SEED_BITS = 0xFFFFFFFF
# 2^32 over the golden ratio, odd: no two sequences of a call have the same multiple of it.
_SEED_STRIDE = 0x9E3779B9


def sequence_seed(seed: int, index: int) -> int:
    """The seed of one sequence of a call, [0, 2^64); sequence 0 has the call's own.

    The generator hashes (seed, position), so that different seeds are all that is needed.
    """
    return seed ^ (index * _SEED_STRIDE & _SEED_BITS)


class Family:
    """All sequences of one call, by index; those of `waiting` wait for `leader`."""

    __slots__ = ("any_succeeded", "leader", "members", "num_left", "waiting")

    def __init__(self, members: list[Request]) -> None:
        self.members = members
        self.leader = members[0]
        self.waiting = members[1:]
        self.num_left = len(members)
        self.any_succeeded = False

    @property
    def usage(self) -> Usage:
        """Of all sequences so far: the prompt counts once, and what of it the first had cached."""
        usages = [member.usage for member in self.members]
        return usages[0]._replace(
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            recomputed_tokens=sum(usage.recomputed_tokens for usage in usages),
            reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
        )

    def timing(self, now: float) -> Timing:
        """Of the whole call: up to the first token by the sequence that had it."""
        first = min(self.members, key=_first_token_at)
        return first.timing(now)._replace(
            preemptions=sum(member.num_preemptions for member in self.members),
            recoveries=sum(member.num_recoveries for member in self.members),
        )

    def finished(self, member: Request, now: float) -> Finished:
        """One of them has ended: what its caller is told."""
        assert member.finish is not None
        self.num_left -= 1
        others_succeeded = self.any_succeeded
        self.any_succeeded |= member.finish.error is None
        usage, timing = self.usage, self.timing(now)
        return Finished(member.finish, usage, timing, self.num_left, others_succeeded)


class Siblings:
    """The families that live. num_waiting: requests that wait for another's prompt."""

    def __init__(self) -> None:
        self.num_waiting = 0
        self._families: dict[str, Family] = {}

    def __contains__(self, request: Request) -> bool:
        """Whether it waits for another's prompt."""
        family = self._families.get(request.call_id)
        return family is not None and request in family.waiting

    def get(self, call_id: str) -> Family | None:
        """The family of a call; None where it asks for one sequence only, or does not live."""
        return self._families.get(call_id)

    def open(self, first: Request) -> list[Request]:
        """All sequences of the call of its first one, which is taken; the others wait here."""
        if first.params.num_sequences == 1:
            return [first]
        prompt = array("I", first.token_ids)
        others = range(1, first.params.num_sequences)
        members = [first, *(_sibling(first, prompt, index) for index in others)]
        self._families[first.call_id] = Family(members)
        self.num_waiting += len(members) - 1
        return members

    def led_by(self, request: Request) -> Family | None:
        """The family that waits for this request's prompt, if one does."""
        family = self._families.get(request.call_id)
        return family if family and family.leader is request and family.waiting else None

    def release(self, family: Family) -> list[Request]:
        """The prompt is cached: nobody waits for it any more."""
        released, family.waiting = family.waiting, []
        self.num_waiting -= len(released)
        return released

    def succeed(self, family: Family) -> Request:
        """The next of those that wait is to compute the prompt."""
        family.leader = family.waiting.pop(0)
        self.num_waiting -= 1
        return family.leader

    def remove(self, request: Request) -> None:
        """It has ended while it waited."""
        self._families[request.call_id].waiting.remove(request)
        self.num_waiting -= 1

    def bereave(self, ended: Iterable[Request]) -> list[Request]:
        """These have ended, not by what they computed: so do all that wait for one of them.

        What kept the leader from its prompt, as a queue that is full, a deadline or the deaths of
        workers, is true of the call.
        """
        orphans: list[Request] = []
        for request in ended:
            if family := self.led_by(request):
                assert request.finish is not None
                for orphan in self.release(family):
                    orphan.end(request.finish)
                    orphans.append(orphan)
        return orphans

    def finished(self, request: Request, now: float) -> Finished:
        """A sequence has ended, which may have no siblings: what its caller is told."""
        family = self._families.get(request.call_id)
        if family is None:
            assert request.finish is not None
            return Finished(request.finish, request.usage, request.timing(now))
        finished = family.finished(request, now)
        if not finished.num_left:
            del self._families[request.call_id]
        return finished


def _sibling(first: Request, prompt: array[int], index: int) -> Request:
    """One more sequence of the call: it waits with the first, and its prompt costs nothing."""
    sampling = Sampling()
    sampling.CopyFrom(first.params.sampling)
    sampling.seed = sequence_seed(sampling.seed, index)
    params = replace(first.params, prompt_token_ids=prompt, sampling=sampling)
    limit, now = first.max_length, first.submitted_at
    sibling = Request(first.call_id, params, context_limit=limit, now=now, index=index)
    sibling.account = first.account
    sibling.arrival = first.arrival
    sibling.expected_cost = first.expected_cost - len(prompt) * PROMPT_TOKEN_COST
    return sibling


def _first_token_at(request: Request) -> float:
    return math.inf if request.first_token_at is None else request.first_token_at
