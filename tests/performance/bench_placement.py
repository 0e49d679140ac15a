"""CPU of the router per generated token, over worker groups and over waiting requests.

Engine, placement and schedulers run for real, without gRPC and without text; the groups are on a
virtual clock and compute as Qwen3-8B on an H100 would. Every request that ends is replaced by
another, so that the number of live ones stays the same: a tenth of each prompt is a system prompt
that many share. CPU is the thread's own time in calls of the engine, after a warm-up. As a control,
as many groups with an engine each: what those cost more than one, the machine's caches cost.

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
SLICE = 0.01  # virtual seconds of a turn, about a step
# Of item 6: what the way of a token through gRPC and text may cost beside this.
STREAM_MICROSECONDS = 15.0


class Measured(NamedTuple):
    engines: int
    groups: int  # of all engines
    waiting: int
    live: int
    token_microseconds: float
    submit_microseconds: float
    group_tokens_per_second: float  # virtual: what one group generates


class Bench:
    """One engine that always has so many requests."""

    def __init__(self, groups: int, live: int, rows: int) -> None:
        self.submitted = self._before = 0
        self.cluster = VirtualCluster(itl_goal=GOAL, gaps=False)
        for number in range(groups):
            name = f"group-{number:02}"
            self.cluster.join(name, rows=rows + 1, kv_tokens=max(rows * 1000, 100_000))
        self.cluster.on_end = lambda name: self.submit()
        for _ in range(live):
            self.submit()

    def submit(self) -> None:
        self.submitted += 1
        rng = self.cluster.rng
        prompt = [rng.randrange(SYSTEM_PROMPTS)] * SHARED_TOKENS
        prompt += [rng.randrange(1000) for _ in range(16)]
        prompt += [1] * (PROMPT_TOKENS - len(prompt))
        self.cluster.submit(f"r{self.submitted}", prompt, rng.randrange(1, 2 * OUTPUT_TOKENS))

    @property
    def counted(self) -> int:
        """Requests submitted since forget."""
        return self.submitted - self._before

    def forget(self) -> None:
        """Count from here."""
        self._before, self.cluster.num_tokens = self.submitted, 0
        self.cluster.cpu_seconds = self.cluster.submit_seconds = 0.0
        self.cluster.ended.clear()


def run(groups: int, live: int, rows: int, seconds: float, engines: int = 1) -> Measured:
    """Keep so many requests live on so many groups for so many virtual seconds, thrice.

    With several engines, each has so many, and they take turns.
    """
    benches = [Bench(groups, live, rows) for _ in range(engines)]
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)  # as the router does
    _advance(benches, seconds)  # until what was submitted at once is spread out
    found: list[Measured] = []
    for _ in range(3):
        for bench in benches:
            bench.forget()
        _advance(benches, seconds)
        clusters = [bench.cluster for bench in benches]
        tokens = sum(cluster.num_tokens for cluster in clusters)
        submits = sum(cluster.submit_seconds for cluster in clusters)
        found.append(
            Measured(
                engines=engines,
                groups=engines * groups,
                waiting=sum(cluster.engine.num_queued for cluster in clusters),
                live=sum(cluster.engine.num_live for cluster in clusters),
                token_microseconds=1e6 * sum(each.cpu_seconds for each in clusters) / tokens,
                submit_microseconds=1e6 * submits / sum(bench.counted for bench in benches),
                group_tokens_per_second=tokens / seconds / engines / groups,
            )
        )
    gc.unfreeze()
    return sorted(found, key=lambda each: each.token_microseconds)[1]


def _advance(benches: Sequence[Bench], seconds: float) -> None:
    for _ in range(round(seconds / SLICE)):
        for bench in benches:
            bench.cluster.run(SLICE)


def show(title: str, rows: Sequence[Measured]) -> None:
    table = Table("groups", "engines", "live", "waiting", title=title)
    for column in ("us/token", "of it submit, us/request", "tokens/s a group", "groups a core"):
        table.add_column(column, justify="right")
    table.add_column(f"with {STREAM_MICROSECONDS:.0f} us for the stream", justify="right")
    for row in rows:
        alone = 1e6 / row.token_microseconds / row.group_tokens_per_second
        both = 1e6 / (row.token_microseconds + STREAM_MICROSECONDS) / row.group_tokens_per_second
        table.add_row(
            str(row.groups),
            str(row.engines),
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
    apart = [run(1, LIVE_PER_GROUP, 256, seconds, engines=n) for n in (16, 64)]
    show(f"{LIVE_PER_GROUP} live requests a group", [*by_groups, *apart])
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
