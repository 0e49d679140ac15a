"""KVCacheManager against brute force, and what it owes to requests, tenants and pins."""

from __future__ import annotations

from collections import Counter

import pytest

from mili.router.cache_memory import Miss
from tests.cache_model import CacheHistory


def run_histories(seeds: range) -> Counter[str]:
    totals = sum((CacheHistory(seed).run(2500) for seed in seeds), Counter[str]())
    print(dict(totals))
    for happening in (
        "hits", "refused", "not grown", "blocks evicted", "flushed", "pinned", "over the limit",
        "over a tenant's limit", *(miss.value for miss in Miss),
    ):  # fmt: skip
        assert totals[happening] >= 30, (happening, totals)
    return totals


@pytest.mark.parametrize("part", range(2))
def test_random_operations_against_brute_force(part: int) -> None:
    assert run_histories(range(part * 10, (part + 1) * 10))["operations"] == 25_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_million_random_operations_against_brute_force() -> None:
    assert run_histories(range(1000, 1400))["operations"] == 1_000_000
