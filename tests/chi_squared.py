"""Were tokens drawn from a distribution?"""

from __future__ import annotations

import math

import torch


def assert_distributed(tokens: torch.Tensor, expected: torch.Tensor) -> None:
    """Pearson's chi-squared, five standard deviations wide."""
    counts = tokens.bincount(minlength=len(expected)).double()
    possible = expected > 0
    assert not counts[~possible].any(), f"impossible tokens were drawn: {counts}"
    wanted = expected[possible].double() * len(tokens)
    statistic = ((counts[possible] - wanted) ** 2 / wanted).sum()
    freedom = max(int(possible.sum()) - 1, 1)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), counts
