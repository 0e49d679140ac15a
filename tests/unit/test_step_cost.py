"""The cost model learns what steps take, and says how much of a prompt fits a time."""

from __future__ import annotations

import math
import random

import pytest

from mili.router.step_cost import LARGEST_MARGIN, StepCost, StepSize, chunk_pairs


def exact(size: StepSize) -> float:
    return 6e-3 + 18e-6 * size.tokens + 49e-9 * size.context + 1e-9 * size.pairs


def decode(rng: random.Random) -> StepSize:
    rows = rng.randint(1, 200)
    return StepSize(rows, rows * rng.randint(500, 1500), 0.0)


def mixed(rng: random.Random) -> StepSize:
    rows, start, count = rng.randint(0, 100), rng.randint(0, 8000), rng.randint(16, 2000)
    return StepSize(rows + count, 1000 * rows + start, chunk_pairs(start, count))


def error(cost: StepCost, size: StepSize) -> float:
    return abs(cost.predict(size) / exact(size) - 1)


def test_it_learns_all_four_costs() -> None:
    rng, cost = random.Random(1), StepCost()
    for _ in range(100):
        size = mixed(rng)
        cost.measured(size, exact(size))
    assert max(error(cost, mixed(rng)) for _ in range(100)) < 1e-4
    assert cost.chunk_seconds(1000, 500) == pytest.approx(
        exact(StepSize(500, 1000, chunk_pairs(1000, 500))) - 6e-3, rel=1e-3
    )


def test_noise_and_outliers_change_little() -> None:
    rng, cost = random.Random(2), StepCost()
    for _ in range(1000):
        size = mixed(rng) if rng.random() < 0.2 else decode(rng)
        slow = 10.0 if rng.random() < 0.01 else 1.0
        cost.measured(size, exact(size) * rng.gauss(1.0, 0.05) * slow)
    assert max(error(cost, mixed(rng)) for _ in range(100)) < 0.06
    assert 1.02 < cost.margin < 1.2


def test_a_long_time_of_decoding_does_not_wear_out_what_prompts_cost() -> None:
    rng, cost = random.Random(3), StepCost()
    for _ in range(100):
        size = mixed(rng)
        cost.measured(size, exact(size) * rng.gauss(1.0, 0.02))
    for _ in range(20_000):
        cost.measured(StepSize(64, 64_000, 0.0), exact(StepSize(64, 64_000, 0.0)))
    assert max(error(cost, mixed(rng)) for _ in range(100)) < 0.1


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    rng, cost = random.Random(4), StepCost()
    for factor in (1.0, 1.5):
        for _ in range(400):
            size = mixed(rng) if rng.random() < 0.5 else decode(rng)
            cost.measured(size, factor * exact(size))
    sizes = [mixed(rng) for _ in range(100)]
    assert max(abs(cost.predict(size) / (1.5 * exact(size)) - 1) for size in sizes) < 0.2
    assert 1.0 <= cost.margin <= LARGEST_MARGIN


def test_a_worker_without_a_clock_teaches_nothing() -> None:
    cost = StepCost()
    before = cost.predict(StepSize(100, 1000, 10.0))
    cost.measured(StepSize(100, 1000, 10.0), 0.0)
    assert cost.predict(StepSize(100, 1000, 10.0)) == before and cost.margin == 1.0


@pytest.mark.parametrize("start", [0, 5000, 30_000])
@pytest.mark.parametrize("seconds", [0.0, 1e-3, 0.02, 0.04])
def test_a_chunk_fills_the_time_and_not_more(start: int, seconds: float) -> None:
    rng, cost = random.Random(5), StepCost()
    for _ in range(100):
        size = mixed(rng)
        cost.measured(size, exact(size))
    count = cost.chunk_within(seconds, start, 100_000)
    assert count == 0 or cost.chunk_seconds(start, count) <= seconds
    assert cost.chunk_seconds(start, count + 1) > seconds
    assert cost.chunk_within(math.inf, start, 77) == 77
