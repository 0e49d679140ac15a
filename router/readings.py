"""What a step reads off the model beside the token it samples: log-probabilities, and a vector.

Owns these values' shape, and their way from the worker's bytes. Does not know requests.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from mili.internal.v1.step_pb2 import Logprobs

# Alternatives beside a token, at most.
MAX_ALTERNATIVES = 20


class TokenLogprobs(NamedTuple):
    """What the model said of the tokens at some positions in a row, before any parameter.

    Column-wise, [positions * width] each: of each position its own token, then the most likely
    ones in order. A rank of 1 is the most likely.
    """

    first_position: int
    width: int
    token_ids: array[int]
    logprobs: array[float]
    ranks: array[int]

    @property
    def num_positions(self) -> int:
        return len(self.token_ids) // self.width

    def part(self, first: int, count: int) -> TokenLogprobs:
        """Return at most `count` positions, from index `first` on."""
        here = slice(first * self.width, (first + count) * self.width)
        columns = (self.token_ids[here], self.logprobs[here], self.ranks[here])
        return TokenLogprobs(self.first_position + first, self.width, *columns)


class Readings(NamedTuple):
    """What one request is told at once, all of it in order.

    sampled: of output tokens; scored: of prompt tokens; embedding: the last token's final hidden
    state.
    """

    sampled: tuple[TokenLogprobs, ...] = ()
    scored: tuple[TokenLogprobs, ...] = ()
    embedding: array[float] | None = None


NOTHING_READ = Readings()


def to_token_logprobs(message: Logprobs) -> TokenLogprobs:
    return TokenLogprobs(
        message.first_position,
        message.width,
        array("I", message.token_ids),
        array("f", message.logprobs),
        array("I", message.ranks),
    )


def to_embedding(values: bytes) -> array[float]:
    return array("f", values)
