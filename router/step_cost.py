"""What a step of a worker group costs, learnt from the steps that it has done.

Owns the model: seconds = per step + per token + per position of context + per attended pair. Does
not know requests, nor why somebody asks. It is an expectation; how long a step may take until its
worker is lost is a bound, and router/liveness.py's.

Method: least squares of the relative error, with no negative cost, by coordinate descent: one sweep
a step, from where the last one ended. Dividing by the measured seconds keeps the few slow outliers
of a machine from counting for more than any other step. Old steps are forgotten only for newer ones
of their size: a long time of small steps does not wear away what is known of large ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# Until steps are measured: seconds for a token, a step, a position, a pair. Only the proportions
# count, of a model of a few billion parameters on a GPU.
FIRST_COSTS = (20e-6, 5e-3, 0.0, 0.0)
# What a step still counts after one more of its size.
DECAY = 0.95
# The margin over the expectation follows this quantile of what is measured, in steps of RATE.
QUANTILE = 0.95
RATE = 0.02
LARGEST_MARGIN = 1.5


class StepSize(NamedTuple):
    """What a step computes.

    tokens: of all rows. context: positions before them, each read once. pairs: of chunks, a token
    with a position that it attends to; a row that computes one token counts in context alone.
    """

    tokens: int
    context: int
    pairs: float


def chunk_pairs(start: int, count: int) -> float:
    """Pairs of a chunk of `count` tokens that begins at position `start`."""
    return count * (start + count / 2)


class StepCost:
    """The cost of a step of one worker group, in seconds. Deterministic: it has no clock."""

    def __init__(self) -> None:
        self._costs = list(FIRST_COSTS)
        # Sums of products: 4 unknowns x (4 unknowns, and the right-hand side), row after row.
        self._sums = [0.0] * 20
        self._sums_by_size: dict[int, list[float]] = {}
        self._margin = 1.0

    @property
    def token_seconds(self) -> float:
        """What one more token of a prompt costs, without its context."""
        return self._costs[0]

    @property
    def margin(self) -> float:
        """What is measured is seldom longer than this times what was expected."""
        return self._margin

    def measured(self, size: StepSize, seconds: float) -> None:
        """Learn from a step. Workers without a clock say 0 seconds, and teach nothing."""
        if seconds <= 0:
            return
        exceeded = seconds > self._margin * self.predict(size)
        self._margin += RATE * (QUANTILE if exceeded else QUANTILE - 1.0)
        self._margin = min(max(self._margin, 1.0), LARGEST_MARGIN)
        row = (size.tokens / seconds, 1 / seconds, size.context / seconds, size.pairs / seconds)
        products = [left * right for left in row for right in (*row, 1.0)]
        old = self._sums_by_size.get(size.tokens.bit_length(), [0.0] * 20)
        new = [DECAY * past + product for past, product in zip(old, products, strict=True)]
        self._sums_by_size[size.tokens.bit_length()] = new
        self._sums = [
            total + now - before for total, now, before in zip(self._sums, new, old, strict=True)
        ]
        self._sweep()

    def predict(self, size: StepSize) -> float:
        """Return the seconds that a step is expected to take."""
        token, step, position, pair = self._costs
        return step + token * size.tokens + position * size.context + pair * size.pairs

    def rows_seconds(self, size: StepSize) -> float:
        """Return what so many more rows would add to a step, in seconds."""
        return self.predict(size) - self._costs[1]

    def chunk_seconds(self, start: int, count: int) -> float:
        """Return what a chunk of a prompt adds to a step, in seconds."""
        token, _, position, pair = self._costs
        return token * count + position * start + pair * chunk_pairs(start, count)

    def chunk_within(self, seconds: float, start: int, most: int) -> int:
        """How many tokens of a prompt, up to `most`, a step can compute in so much more time."""
        if self.chunk_seconds(start, most) <= seconds:
            return most
        token, _, position, pair = self._costs
        left = seconds - position * start
        if left <= 0:
            return 0
        linear = token + pair * start
        # left = linear * count + pair / 2 * count ** 2, solved so that pair may be 0.
        return int(2 * left / (linear + math.sqrt(linear * linear + 2 * pair * left)))

    def _sweep(self) -> None:
        costs, sums = self._costs, self._sums
        for index in range(4):
            row = sums[5 * index : 5 * index + 5]
            if row[index] > 0:
                others = sum(map(float.__mul__, row, costs)) - row[index] * costs[index]
                costs[index] = max(0.0, (row[4] - others) / row[index])
