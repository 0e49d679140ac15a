"""The KV cache's figures: hit ratios, runs of adjacent blocks, and what each call costs.

    python -m tests.performance.bench_kv_cache [--only hits|runs|calls|steps]

All in one process, without a worker: the tables of docs/05-kv-cache.md.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import deque
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from mili.internal.v1.step_pb2 import Sampling, StepResult
from mili.router.block_pool import Allocation, BlockPool, runs
from mili.router.cache_memory import CacheMemory
from mili.router.kv_cache import CacheSettings, KVCacheManager
from mili.router.limits import Limits
from mili.router.params import GenerationParams
from mili.router.request import Request
from mili.router.scheduler import Scheduler
from tests.cache_traces import (
    BLOCK_SIZE,
    hit_ratio,
    multi_turn,
    perfect_hit_ratio,
    shared_system_prompt,
    working_set,
)

POOL = 40_000  # blocks: 640,000 tokens
STRATEGIES: tuple[Allocation, ...] = ("first-fit", "best-fit")


class Stopwatch:
    """How long something takes that is done again and again."""

    def __init__(self) -> None:
        self.times: list[float] = []  # seconds

    def time(self, call: Callable[..., object], *args: object) -> object:
        start = time.perf_counter()
        result = call(*args)
        self.times.append(time.perf_counter() - start)
        return result

    @property
    def microseconds(self) -> float:
        """The median: other work on the machine does not move it far."""
        return statistics.median(self.times) * 1e6


def print_hits(console: Console) -> None:
    table = _table(
        "Hit ratio: prompt tokens from the cache",
        "trace", "cache / working set", "perfect LRU", "MILI", "difference", "8 at a time",
    )  # fmt: skip
    for trace in (multi_turn, shared_system_prompt):
        calls = trace(1500)
        total = working_set(calls)
        for share in (0.05, 0.1, 0.2, 0.4, 1.0):
            num_blocks = int(share * total)
            perfect = perfect_hit_ratio(calls, num_blocks)
            ours, together = (
                hit_ratio(KVCacheManager(num_blocks + 1, BLOCK_SIZE), calls, concurrency)
                for concurrency in (1, 8)
            )
            table.add_row(
                trace.__name__.replace("_", " "),
                f"{share:.0%}",
                f"{perfect:.2%}",
                f"{ours:.2%}",
                f"{100 * (ours - perfect):+.2f} points",
                f"{together:.2%}",
            )
    console.print(table)


def print_runs(console: Console) -> None:
    table = _table(
        f"Runs of adjacent blocks, {POOL:,} blocks, prompts of 60 blocks on average",
        "state", "strategy", "blocks a run", "runs a prompt", "longest free", "prompt", "one block",
        "freeing",
    )  # fmt: skip
    for share in (0.5, 0.8, 0.95):
        for allocation in STRATEGIES:
            _churn(table, f"{share:.0%} held, no cache", BlockPool(POOL, allocation), share)
    for what, limit in (
        ("cache full, lru", None),
        ("cache to 90 %, token-limit", 0.9),
        ("cache to 80 %, token-limit", 0.8),
    ):
        for allocation in STRATEGIES:
            _fill_cache(table, what, allocation, limit)
    console.print(table)


def _churn(table: Table, what: str, pool: BlockPool, share: float) -> None:
    """Requests come, grow by a block at a time in turns, and go, in no order; none shares."""
    chance = random.Random(1)
    held: list[list[int]] = []
    prompts, singles, frees = Stopwatch(), Stopwatch(), Stopwatch()
    num_prompts = num_runs = num_blocks = 0
    for number in range(6000):
        size = _prompt_blocks(chance)
        while pool.num_blocks - pool.num_free + size > share * pool.num_blocks:
            frees.time(pool.free, held.pop(chance.randrange(len(held))))
        blocks = prompts.time(pool.allocate, size)
        assert isinstance(blocks, list)
        held.append(blocks)
        if number >= 1000:
            num_prompts, num_blocks = num_prompts + 1, num_blocks + size
            num_runs += sum(1 for _ in runs(blocks))
        for _ in range(min(20, pool.num_free)):
            chance.choice(held).extend(singles.time(pool.allocate, 1))  # type: ignore[arg-type]
    _add_runs(
        table, what, pool, num_blocks, num_runs, num_prompts,
        (prompts.microseconds, singles.microseconds, frees.microseconds),
    )  # fmt: skip


def _fill_cache(table: Table, what: str, allocation: Allocation, limit: float | None) -> None:
    """64 requests at a time, every prompt its own; what they leave stays until it is evicted."""
    settings = CacheSettings(allocation)
    if limit is not None:
        settings = CacheSettings(allocation, "token-limit", int(limit * POOL * BLOCK_SIZE))
    kv = KVCacheManager(POOL, BLOCK_SIZE, settings)
    chance = random.Random(1)
    running: deque[Request] = deque()
    num_prompts = num_runs = num_blocks = 0
    for number in range(4000):
        size = _prompt_blocks(chance)
        request = _request(number, chance.choices(range(32_000), k=size * BLOCK_SIZE))
        blocks = kv.admit(request, headroom=0)
        assert blocks is not None
        request.num_computed = len(request.token_ids)
        kv.publish(request, request.num_computed)
        running.append(request)
        for other in running:
            other.token_ids.extend(range(BLOCK_SIZE))
            assert kv.grow(other, len(other.token_ids)) is not None
        if len(running) > 64:
            done = running.popleft()
            done.num_computed = len(done.token_ids) - 1
            kv.publish(done, done.num_computed)
            kv.release(done)
        if number >= 1000:
            num_prompts, num_blocks = num_prompts + 1, num_blocks + size
            num_runs += sum(1 for _ in runs(blocks))
    _add_runs(table, what, kv._pool, num_blocks, num_runs, num_prompts, None)


def _add_runs(
    table: Table,
    what: str,
    pool: BlockPool,
    num_blocks: int,
    num_runs: int,
    num_prompts: int,
    costs: tuple[float, float, float] | None,
) -> None:
    free = [block for block in range(pool.num_blocks) if pool._is_free[block]]
    longest = max((end - start for start, end in runs(free)), default=0)
    table.add_row(
        what,
        "first-fit" if type(pool._strategy).__name__ == "FirstFit" else "best-fit",
        f"{num_blocks / num_runs:.1f}",
        f"{num_runs / num_prompts:.2f}",
        f"{longest} of {len(free)}",
        *([f"{cost:.2f} us" for cost in costs] if costs else ["", "", ""]),
    )


def print_calls(console: Console) -> None:
    table = _table("What a call costs", "call", "time")
    chance = random.Random(1)
    kv = KVCacheManager(POOL, BLOCK_SIZE)
    watches = {
        name: Stopwatch()
        for name in ("match", "admit", "grow, no block", "grow, a block", "publish", "release")
    }
    system = [chance.randrange(32_000) for _ in range(1024)]
    for number in range(3000):
        request = _request(number, system + [chance.randrange(32_000) for _ in range(1024)])
        watches["match"].time(kv.num_cached_tokens, request)
        watches["admit"].time(kv.admit, request, 0)
        request.num_computed = 2048
        kv.publish(request, 2048)
        for length in range(2049, 2049 + 4 * BLOCK_SIZE):
            starts_block = length % BLOCK_SIZE == 1
            name = "grow, a block" if starts_block else "grow, no block"
            watches[name].time(kv.grow, request, length)
            request.token_ids.append(7)
            request.num_computed = length
            if length % BLOCK_SIZE == 0:
                watches["publish"].time(kv.publish, request, length)
        watches["release"].time(kv.release, request)
    notes = {
        "match": " (2,048 tokens, 1,024 cached)",
        "admit": " (the same, evicting 64 blocks)",
        "publish": " (a block)",
        "release": " (2,112 tokens)",
    }
    for name, watch in watches.items():
        table.add_row(name + notes.get(name, ""), f"{watch.microseconds:.2f} us")
    _time_memory(table)
    console.print(table)


def _time_memory(table: Table) -> None:
    """What it costs to know why a prompt missed: of each block, when it is cached and evicted."""
    memory = CacheMemory(4 * BLOCK_SIZE, capacity=POOL)
    chance = random.Random(1)
    remember, evict, why = Stopwatch(), Stopwatch(), Stopwatch()
    for _ in range(3):
        for first in range(1, POOL - 64, 64):
            key = chance.randbytes(64 * 4 * BLOCK_SIZE)
            remember.time(memory.remember, 0, key, range(first, first + 64))
        for first in range(1, POOL - 64, 64):
            why.time(memory.why, b"", first, key[:64])
            evict.time(memory.evict, b"", range(first, first + 64))
    table.add_row("memory: a block cached", f"{remember.microseconds / 64:.3f} us")
    table.add_row("memory: a block evicted", f"{evict.microseconds / 64:.3f} us")
    table.add_row("memory: why a prompt missed", f"{why.microseconds:.2f} us")


def print_steps(console: Console) -> None:
    """A decode step of 256 rows, each of which needs a block every 16 steps; the best of 5 runs."""
    table = _table(
        "A decode step of 256 rows, median", "strategy", "eviction", "schedule", "update"
    )
    for allocation in STRATEGIES:
        for eviction in ("lru", "token-limit"):
            settings = CacheSettings(allocation, eviction, 100_000 if eviction != "lru" else None)
            found = [_decode(settings) for _ in range(5)]
            schedule, update = (min(times) for times in zip(*found, strict=True))
            table.add_row(allocation, eviction, f"{schedule:.0f} us", f"{update:.0f} us")
    console.print(table)


def _decode(settings: CacheSettings) -> tuple[float, float]:
    """Medians of schedule and update, in microseconds."""
    limits = Limits(POOL, BLOCK_SIZE, 257, 8192, 4096, 1000)
    scheduler = Scheduler(limits, cache=settings)
    chance = random.Random(1)
    for number in range(256):
        tokens = [chance.randrange(1000) for _ in range(100 + number % 16)]
        scheduler.add(_request(number, tokens))
    schedules, updates = [], []
    for _ in range(400):
        start = time.perf_counter()
        command = scheduler.schedule()
        schedules.append(time.perf_counter() - start)
        assert command is not None
        samples = [row.samples for row in scheduler.in_flight[0].rows]
        result = StepResult(
            step=command.step, num_new=map(int, samples), token_ids=[7] * sum(samples)
        )
        start = time.perf_counter()
        scheduler.update(result)
        updates.append(time.perf_counter() - start)
    return statistics.median(schedules[50:]) * 1e6, statistics.median(updates[50:]) * 1e6


def _prompt_blocks(chance: random.Random) -> int:
    return max(1, min(2000, int(chance.lognormvariate(3.6, 1.0))))


def _request(number: int, tokens: list[int]) -> Request:
    params = GenerationParams(tokens, Sampling(seed=1), max_tokens=3000)
    return Request(str(number), params, context_limit=1 << 20)


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


_PARTS = {"hits": print_hits, "runs": print_runs, "calls": print_calls, "steps": print_steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=_PARTS)
    arguments = parser.parse_args()
    console = Console(width=140)
    for name, part in _PARTS.items():
        if arguments.only in (None, name):
            part(console)


if __name__ == "__main__":
    main()
