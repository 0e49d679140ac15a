"""Figures of the last seconds: how many tokens are given out, and how many prompts are cached.

Owns sums that forget. Does not know the clock (time is monotonic seconds, passed in).
"""

from __future__ import annotations

import math

# Seconds after which a measurement counts 1/e.
WINDOW = 5.0


class DecayingSum:
    """A sum that forgets: what was added WINDOW seconds ago counts 1/e."""

    __slots__ = ("_at", "_sum")

    def __init__(self) -> None:
        self._sum = 0.0
        self._at = -math.inf

    def add(self, amount: float, now: float) -> None:
        self._sum = self.value(now) + amount
        self._at = now

    def value(self, now: float) -> float:
        return self._sum * math.exp((self._at - now) / WINDOW)


class Meter:
    """Of all worker groups together."""

    def __init__(self) -> None:
        self._output_tokens = DecayingSum()
        self._prompt_tokens = DecayingSum()
        self._cached_tokens = DecayingSum()

    def output(self, num_tokens: int, now: float) -> None:
        self._output_tokens.add(num_tokens, now)

    def prompt(self, num_tokens: int, num_cached: int, now: float) -> None:
        self._prompt_tokens.add(num_tokens, now)
        self._cached_tokens.add(num_cached, now)

    def output_tokens_per_second(self, now: float) -> float:
        return self._output_tokens.value(now) / WINDOW

    def prefix_hit_ratio(self, now: float) -> float:
        """0 where no prompt came for so long that none counts."""
        prompts = self._prompt_tokens.value(now)
        return self._cached_tokens.value(now) / prompts if prompts > 1e-9 else 0.0
