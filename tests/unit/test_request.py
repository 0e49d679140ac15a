"""One request's books: what it is told of, and of that nothing twice."""

from __future__ import annotations

from array import array

from mili.internal.v1.step_pb2 import Sampling
from mili.router.params import GenerationParams
from mili.router.readings import TokenLogprobs
from mili.router.request import NEVER, Request


def piece(first: int, count: int) -> TokenLogprobs:
    """Two columns a position, whose first token is the position."""
    ids = array("I", [value for position in range(count) for value in (first + position, 0)])
    zeros = array("f", [0.0] * len(ids))
    return TokenLogprobs(first, 2, ids, zeros, array("I", [1] * len(ids)))


def test_scored_positions_that_two_admissions_read_are_told_once() -> None:
    """A step that was in flight at a preemption reads what the next admission reads again."""
    params = GenerationParams(
        [1] * 12, Sampling(), max_tokens=9, num_prompt_logprobs=1, score_from=3
    )
    request = Request("r", params, context_limit=40)
    for first, count in ((3, 4), (3, 2), (5, 5), (10, 2)):
        request.score(piece(first, count))
        request.peak_computed = max(request.peak_computed, first + count - 1)
    assert request.score_from == NEVER
    assert request.readings is not None
    told = [part.token_ids[0::2].tolist() for part in request.readings.scored]
    assert told == [[3, 4, 5, 6], [7, 8, 9], [10, 11]]
    assert all(part.first_position == part.token_ids[0] for part in request.readings.scored)
