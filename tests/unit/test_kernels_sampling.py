"""Sampling against exact distributions, and against itself in other company."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mili.kernels.reference_sampling import (
    SamplingRows,
    exponentials,
    penalize_repetition_,
    philox4x32,
    sample,
    suppress_,
)
from tests.chi_squared import assert_distributed

PROBABILITIES = torch.tensor([0.05, 0.30, 0.003, 0.15, 0.10, 0.02, 0.25, 0.08, 0.007, 0.04])
LOGITS = PROBABILITIES.log() + 3.0
DRAWS = 2_000


def make_rows(
    positions: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    seed: int = 1234,
) -> SamplingRows:
    count = len(positions)
    return SamplingRows(
        torch.full((count,), temperature),
        torch.full((count,), top_k),
        torch.full((count,), top_p),
        torch.full((count,), min_p),
        torch.full((count,), seed),
        positions,
    )


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            0xFFFFFFFF_FFFFFFFF,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: int, expected: tuple[int, ...]
) -> None:
    words = philox4x32(np.array(counter[:1]), counter[1], key, high=counter[2:])
    assert tuple(words[0].tolist()) == expected


def test_exponentials_are_exponential_and_the_same_for_any_choice_of_tokens() -> None:
    whole = exponentials(7, 5, None, 99_999)
    assert whole.shape == (99_999,)
    chosen = torch.tensor([99_998, 3, 4, 50_001])
    assert torch.equal(exponentials(7, 5, chosen, 99_999), whole[chosen])
    for quantile in (0.01, 0.1, 0.5, 0.9, 0.99):
        share = (whole < -math.log1p(-quantile)).double().mean()
        assert abs(share - quantile) < 5 * math.sqrt(quantile * (1 - quantile) / 99_999)
    assert not torch.equal(whole, exponentials(7, 6, None, 99_999))
    assert not torch.equal(whole, exponentials(7 + (1 << 40), 5, None, 99_999))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2),
        ({"temperature": 2.0}, PROBABILITIES**0.5),
        ({"top_k": 3}, PROBABILITIES * (PROBABILITIES >= 0.15)),
        ({"top_k": 1}, PROBABILITIES * (PROBABILITIES >= 0.30)),
        ({"top_p": 0.6}, PROBABILITIES * (PROBABILITIES >= 0.15)),
        ({"top_p": 0.01}, PROBABILITIES * (PROBABILITIES >= 0.30)),
        ({"min_p": 0.3}, PROBABILITIES * (PROBABILITIES >= 0.09)),
        # Of the best four, 0.8 together, the first three are 0.875 of it.
        ({"top_k": 4, "top_p": 0.85}, PROBABILITIES * (PROBABILITIES >= 0.15)),
        # min-p comes after temperature: 0.25 / 0.30 squared is 0.69.
        ({"temperature": 0.5, "min_p": 0.7}, PROBABILITIES * (PROBABILITIES >= 0.30)),
    ],
)
def test_distribution(options: dict[str, float], expected: torch.Tensor) -> None:
    rows = make_rows(torch.arange(DRAWS), **options)  # type: ignore[arg-type]
    tokens = sample(LOGITS.expand(DRAWS, -1), rows)
    assert_distributed(tokens, expected / expected.sum())


def test_seeds_are_independent() -> None:
    seeds = torch.arange(DRAWS) * 0x9E3779B97F4A7C15
    rows = make_rows(torch.zeros(DRAWS, dtype=torch.int64))._replace(seed=seeds)
    assert_distributed(sample(LOGITS.expand(DRAWS, -1), rows), PROBABILITIES)


def test_top_p_of_a_flat_distribution_sorts_the_whole_vocabulary() -> None:
    logits = torch.linspace(0, 0.1, 5000).flip(0)[None]
    probabilities = logits[0].double().softmax(dim=0)
    kept = int((probabilities.cumsum(0) - probabilities < 0.9).sum())
    rows = make_rows(torch.arange(1000), top_p=0.9)
    tokens = sample(logits.expand(1000, -1), rows)
    assert int(tokens.max()) < kept
    assert int(tokens.max()) > kept * 0.98


def test_a_token_is_a_function_of_its_row_alone() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(12, 4097, generator=generator) * 2
    rows = SamplingRows(
        temperature=torch.tensor([0.0, 0.7, 1.0, 1.3] * 3),
        top_k=torch.tensor([0, 5, 0, 50] * 3),
        top_p=torch.tensor([0.0, 0.9, 0.95, 1.0] * 3),
        min_p=torch.tensor([0.0] * 8 + [0.05] * 4),
        seed=torch.arange(12) * -77,
        position=torch.arange(12) + 1000,
    )
    together = sample(logits, rows)
    for row in range(12):
        alone = SamplingRows(*(column[row : row + 1] for column in rows))
        assert sample(logits[row : row + 1], alone) == together[row]
    order = torch.randperm(12, generator=generator)
    shuffled = SamplingRows(*(column[order] for column in rows))
    assert torch.equal(sample(logits[order], shuffled), together[order])


def test_a_filter_that_keeps_the_winner_changes_nothing() -> None:
    logits = torch.randn(400, 2000, generator=torch.Generator().manual_seed(6)) * 4
    positions = torch.arange(400)
    free = sample(logits, make_rows(positions))
    narrow = sample(logits, make_rows(positions, top_k=50))
    kept = logits.gather(1, free[:, None]) >= logits.topk(50).values[:, -1:]
    assert kept.sum() > 300
    assert torch.equal(free[kept[:, 0]], narrow[kept[:, 0]])


def test_greedy_and_extreme_temperatures() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]] * 3)
    rows = make_rows(torch.arange(3))._replace(temperature=torch.tensor([0.0, 1e-30, 1e-6]))
    assert sample(logits, rows).tolist() == [1, 1, 1]


def test_repetition_penalty_counts_a_token_once() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5], [2.0, -2.0, 1.0, 0.5]])
    history = torch.tensor([[0, 1, 1, 0, 3], [0, 1, 2, 3, 3]])
    penalize_repetition_(logits, history, torch.tensor([4, 5]), torch.tensor([2.0, 1.0]))
    assert logits.tolist() == [[1.0, -4.0, 1.0, 0.5], [2.0, -2.0, 1.0, 0.5]]


def test_suppressed_tokens_are_never_drawn() -> None:
    logits = LOGITS.repeat(DRAWS, 1)
    every = torch.arange(DRAWS)
    suppress_(logits, every.repeat(2), torch.tensor([1] * DRAWS + [3] * DRAWS))
    expected = PROBABILITIES.clone()
    expected[[1, 3]] = 0
    assert_distributed(sample(logits, make_rows(every)), expected / expected.sum())


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        sample(LOGITS[None].double(), make_rows(torch.arange(1)))
    with pytest.raises(ValueError, match="one value for each of 2 rows"):
        sample(LOGITS.expand(2, -1), make_rows(torch.arange(1)))
