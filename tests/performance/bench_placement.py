"""CPU of the router per generated token, over worker groups and over waiting requests.

Engine, placement and schedulers run for real, without gRPC and without text; the groups are on a
virtual clock and compute as Qwen3-8B on an H100 would. Every request that ends is replaced by
another, so that the number of live ones stays the same: a tenth of each prompt is a system prompt
that many share. CPU is the thread's own time in calls of the engine, after a warm-up.

    python -m tests.performance.bench_placement [--svg FILE] [--seconds 6]
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from mili.router.main import GC_THRESHOLD
from tests.performance.svg import Series, plot
from tests.performance.virtual_groups import VirtualCluster

LIVE_PER_GROUP = 157  # 64 groups: 10,048
PROMPT_TOKENS, OUTPUT_TOKENS = 480, 128
SHARED_TOKENS, SYSTEM_PROMPTS = 48, 100
GOAL = 0.05
# Of item 6: what the way of a token through gRPC and text may cost beside this.
STREAM_MICROSECONDS = 15.0


class Measured(NamedTuple):
    groups: int
    waiting: int
    live: int
    token_microseconds: float
    submit_microseconds: float
    group_tokens_per_second: float  # virtual: what one group generates
    hit_ratio: float


def run(groups: int, live: int, rows: int, seconds: float) -> Measured:
    """Keep so many requests live on so many groups for so many virtual seconds, thrice."""
    cluster = VirtualCluster(itl_goal=GOAL, gaps=False)
    rng = cluster.rng
    for number in range(groups):
        cluster.join(f"group-{number:02}", rows=rows + 1, kv_tokens=max(rows * 1000, 100_000))
    submitted = 0

    def submit(output: int) -> None:
        nonlocal submitted
        submitted += 1
        prompt = [rng.randrange(SYSTEM_PROMPTS)] * SHARED_TOKENS
        prompt += [rng.randrange(1000) for _ in range(16)]
        cluster.submit(f"r{submitted}", [*prompt, *[1] * (PROMPT_TOKENS - 16)], output)

    cluster.on_end = lambda name: submit(rng.randrange(1, 2 * OUTPUT_TOKENS))
    for _ in range(live):
        submit(rng.randrange(1, 2 * OUTPUT_TOKENS))
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)  # as the router does
    cluster.run(seconds)  # until what was submitted at once is spread out
    found: list[Measured] = []
    for _ in range(3):
        cluster.cpu_seconds = cluster.submit_seconds = 0.0
        tokens, before, started = cluster.num_tokens, submitted, cluster.now
        cluster.ended.clear()
        cluster.run(seconds)
        generated = cluster.num_tokens - tokens
        cached = sum(told.cached_tokens for told in cluster.ended)
        found.append(
            Measured(
                groups=groups,
                waiting=cluster.engine.num_queued,
                live=cluster.engine.num_live,
                token_microseconds=1e6 * cluster.cpu_seconds / generated,
                submit_microseconds=1e6 * cluster.submit_seconds / (submitted - before),
                group_tokens_per_second=generated / (cluster.now - started) / groups,
                hit_ratio=cached / sum(told.num_prompt_tokens for told in cluster.ended),
            )
        )
    gc.unfreeze()
    return sorted(found, key=lambda each: each.token_microseconds)[1]


def show(title: str, rows: Sequence[Measured]) -> None:
    table = Table("groups", "live", "waiting", title=title)
    for column in ("us/token", "of it submit, us/request", "tokens/s a group", "groups a core"):
        table.add_column(column, justify="right")
    table.add_column(f"with {STREAM_MICROSECONDS:.0f} us for the stream", justify="right")
    for row in rows:
        alone = 1e6 / row.token_microseconds / row.group_tokens_per_second
        both = 1e6 / (row.token_microseconds + STREAM_MICROSECONDS) / row.group_tokens_per_second
        table.add_row(
            str(row.groups),
            str(row.live),
            str(row.waiting),
            f"{row.token_microseconds:.2f}",
            f"{row.submit_microseconds:.0f}",
            f"{row.group_tokens_per_second:.0f}",
            f"{alone:.1f}",
            f"{both:.1f}",
        )
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--seconds", type=float, default=6.0)
    arguments = parser.parse_args()
    seconds: float = arguments.seconds
    by_groups = [run(n, n * LIVE_PER_GROUP, 256, seconds) for n in (1, 4, 16, 64)]
    show(f"{LIVE_PER_GROUP} live requests a group", by_groups)
    by_waiting = [run(4, n + 4 * 64, 64, seconds) for n in (100, 1_000, 10_000)]
    show("4 groups of 64 rows, and a queue", by_waiting)
    if arguments.svg:
        lines = [
            Series("groups", [(row.groups, row.token_microseconds) for row in by_groups]),
            Series("waiting", [(row.waiting, row.token_microseconds) for row in by_waiting]),
        ]
        arguments.svg.write_text(
            plot("Router CPU", "worker groups, or waiting requests", "us per token", lines)
        )


if __name__ == "__main__":
    main()
