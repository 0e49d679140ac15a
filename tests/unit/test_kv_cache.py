"""KVCacheManager against brute force, and what it owes to requests, tenants and pins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from mili.internal.v1.step_pb2 import Sampling
from mili.router.cache_memory import Miss
from mili.router.config import RouterConfig
from mili.router.kv_cache import CacheSettings, KVCacheManager
from mili.router.limits import Limits
from mili.router.params import GenerationParams
from mili.router.request import Request
from mili.router.scheduler import Scheduler
from tests.cache_model import ANNA, BERT, CacheHistory
from tests.cache_traces import (
    Call,
    hit_ratio,
    multi_turn,
    perfect_hit_ratio,
    shared_system_prompt,
    working_set,
)
from tests.fake_worker import FakeModel, FakeWorker


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


@pytest.mark.parametrize("trace", [multi_turn, shared_system_prompt])
@pytest.mark.parametrize("share", [0.07, 0.25])
def test_hits_are_those_of_a_perfect_lru(trace: Callable[[int], list[Call]], share: float) -> None:
    """At least its hit ratio minus two points, with a cache of this share of the working set."""
    calls = trace(400)
    num_blocks = int(share * working_set(calls))
    perfect = perfect_hit_ratio(calls, num_blocks)
    ratio = hit_ratio(KVCacheManager(num_blocks + 1, 16), calls)
    print(f"{trace.__name__}, {num_blocks} blocks: {ratio:.4f} against {perfect:.4f}")
    assert 0.1 < perfect < 0.95
    assert ratio >= perfect - 0.02


def make_request(
    tokens: Sequence[int],
    namespace: bytes = ANNA,
    *,
    cache_read: bool = True,
    cache_write: bool = True,
) -> Request:
    params = GenerationParams(
        tokens,
        Sampling(seed=1),
        max_tokens=4,
        cache_namespace=namespace,
        cache_read=cache_read,
        cache_write=cache_write,
    )
    return Request(f"{namespace!r} {tokens!r} {params!r}", params, context_limit=1000)


def run(kv: KVCacheManager, request: Request) -> Request:
    """Admit, compute, publish and release it."""
    assert kv.admit(request, headroom=0) is not None
    request.num_computed = len(request.token_ids)
    kv.publish(request, request.num_computed)
    kv.release(request)
    kv.check()
    return request


def test_a_request_says_why_it_missed() -> None:
    kv = KVCacheManager(6, 2)
    tokens = [1, 2, 3, 4, 5]
    assert run(kv, make_request(tokens)).cache_miss is Miss.NEVER_SEEN
    assert run(kv, make_request(tokens)).cache_miss is Miss.NOT_FULL_BLOCK
    assert run(kv, make_request(tokens, cache_read=False)).cache_miss is Miss.BYPASSED
    assert run(kv, make_request(tokens, BERT)).cache_miss is Miss.OTHER_TENANT
    run(kv, make_request([9] * 10))
    assert run(kv, make_request(tokens)).cache_miss is Miss.EVICTED
    assert kv.counters.misses == {
        Miss.NEVER_SEEN: 2,
        Miss.OTHER_TENANT: 1,
        Miss.EVICTED: 1,
        Miss.NOT_FULL_BLOCK: 1,
        Miss.BYPASSED: 1,
    }
    assert (kv.counters.tokens_asked, kv.counters.tokens_hit) == (35, 4)


def test_what_is_not_to_be_read_or_written_is_not() -> None:
    kv = KVCacheManager(20, 2)
    tokens = [1, 2, 3, 4, 5]
    run(kv, make_request(tokens, cache_write=False))
    assert kv.usage().cached == 0
    run(kv, make_request(tokens))
    again = make_request(tokens, cache_read=False)
    assert kv.num_cached_tokens(again) == 0
    table = kv.admit(again, headroom=0)
    assert again.num_computed == 0 and table is not None
    again.num_computed = 5
    kv.publish(again, 5)  # all of it is a duplicate
    assert kv.usage().cached == 2 and kv.usage().held == 3
    kv.release(again)
    assert kv.usage().held == 0


def test_an_admission_after_a_preemption_counts_for_nothing() -> None:
    kv = KVCacheManager(20, 2)
    request = make_request([1, 2, 3, 4, 5])
    run(kv, request)
    request.num_admissions = 1
    run(kv, request)
    assert request.cache_miss is Miss.NEVER_SEEN
    assert kv.counters.tokens_asked == 5


def test_a_pinned_prefix_outlives_what_would_evict_it() -> None:
    kv = KVCacheManager(11, 2, max_pinned_blocks=3)
    tokens = list(range(8))
    run(kv, make_request(tokens))
    assert kv.pin("pin", ANNA, tokens) == 6, "as many as may be pinned"
    assert kv.pin("other", ANNA, tokens) == 0
    run(kv, make_request([9] * 13))
    assert kv.num_cached_tokens(make_request(tokens)) == 6
    kv.unpin("pin")
    kv.unpin("other")
    run(kv, make_request([9] * 19))
    assert kv.num_cached_tokens(make_request(tokens)) == 0
    with pytest.raises(KeyError):
        kv.unpin("pin")


def test_pins_leave_room_for_the_longest_request() -> None:
    """I7: whatever is pinned, a request of the context limit runs to its end."""
    scheduler = Scheduler(
        Limits(
            num_blocks=20, block_size=2, max_rows=4, max_step_tokens=8, max_model_len=30,
            vocab_size=3,
        )
    )  # fmt: skip
    worker = FakeWorker(20, 2, FakeModel(eos_every=1 << 60, fault_every=1 << 60))
    pinned = [1, 0] * 8
    for number, (tokens, length) in enumerate(((pinned, 1), ([0] * 20, 10))):
        params = GenerationParams(tokens, Sampling(seed=1), max_tokens=length)
        request = Request(str(number), params, context_limit=scheduler.context_limit)
        scheduler.add(request)
        for _ in range(40):
            if (command := scheduler.schedule()) is not None:
                scheduler.update(worker.execute(command))
        assert request.finish is not None and request.num_output_tokens == length
        if number == 0:
            assert scheduler.kv.pin("pin", b"", pinned) == 8  # 19 blocks - 15 of the longest
    assert scheduler.kv.num_cached_tokens(make_request(pinned, b"")) == 8
    scheduler.check()


def test_limits_in_tokens_hold_for_a_tenant_and_for_all() -> None:
    settings = CacheSettings(eviction="token-limit", token_limit=10, tenant_token_limits={ANNA: 5})
    kv = KVCacheManager(40, 2, settings)
    run(kv, make_request([1] * 9))
    assert kv.num_tenant_tokens(ANNA) == 4
    run(kv, make_request([2] * 9, BERT))
    assert (kv.num_tenant_tokens(ANNA), kv.num_tenant_tokens(BERT)) == (2, 8)
    assert kv.usage().free == 34
    assert kv.counters.blocks_evicted == 3


def test_flush_says_how_many_blocks_it_freed() -> None:
    kv = KVCacheManager(40, 2)
    for namespace in (ANNA, ANNA + b"salt", BERT):
        run(kv, make_request([1] * 9, namespace))
    assert kv.flush(ANNA) == 8
    assert kv.flush(None) == 4
    assert kv.usage().free == 39
    assert kv.counters.blocks_evicted == 0


def test_a_limit_without_its_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="cache_token_limit is for eviction_policy token-limit"):
        RouterConfig(model="model", cache_token_limit=1000)
    assert RouterConfig(model="m", cache_token_limit=1000, eviction_policy="token-limit")
