"""Inter-token latency under a mixed load, with and without a goal, on a virtual clock.

Chats stream while long prompts come in; the worker group has a cost model of Qwen3-8B on an H100,
with noise that the router does not know. A second load has so many streams with so long contexts
that they alone come near the goal: there prompts must still get on.

    python -m tests.performance.bench_itl [--seconds 120]
"""

from __future__ import annotations

import argparse
import math
import random
from collections import defaultdict
from functools import partial
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from tests.performance.virtual_groups import VirtualCluster, quantile

GOAL = 0.05


class Load(NamedTuple):
    """Streams from the beginning to the end, and arrivals per second (Poisson).

    *_tokens: of a prompt, for chats and their mean output, too; of documents, from..to.
    """

    name: str
    streams: int
    stream_tokens: int
    chats: float
    chat_tokens: int
    chat_output_tokens: int
    documents: float
    document_tokens: tuple[int, int]


MIXED = Load("chats and documents", 0, 0, 12.0, 300, 250, 0.8, (2_000, 30_000))
CROWDED = Load("110 streams of 6000 tokens", 110, 6_000, 2.0, 300, 100, 0.15, (2_000, 10_000))


class Measured(NamedTuple):
    """Seconds, of requests that ended: gaps between tokens, and times to the first token."""

    gaps: list[float]
    chats: list[float]
    documents: list[float]
    tokens_per_second: float


def run(load: Load, itl_goal: float, seconds: float, seed: int = 1) -> Measured:
    """Serve the load for so many virtual seconds, and then what is left."""
    cluster = VirtualCluster(seed=seed, itl_goal=itl_goal)
    cluster.join("group", kv_tokens=1_200_000)
    rng = random.Random(seed)  # apart from the noise: the same load for every goal

    def submit(name: str, length: int, output: int) -> None:
        prompt = [rng.randrange(1000) for _ in range(16)] + [1] * (length - 16)
        cluster.submit(name, prompt, output)

    # Their prompts are one cached prefix: the streams are there at once.
    for number in range(load.streams):
        cluster.submit(f"stream{number}", [2] * load.stream_tokens, round(seconds / GOAL))
        cluster.run(0.5 if number == 0 else 0.0)
    cluster.run(2.0)
    at = 0.0
    while (at := at + rng.expovariate(load.chats)) < seconds:
        output = 1 + round(rng.expovariate(1 / load.chat_output_tokens))
        cluster.after(at, partial(submit, f"chat{at}", load.chat_tokens, output))
    at = 0.0
    while (at := at + rng.expovariate(load.documents)) < seconds:
        length = rng.randint(*load.document_tokens)
        cluster.after(at, partial(submit, f"document{at}", length, 50))
    cluster.run()
    lengths = {load.chat_tokens: "chats", load.stream_tokens: "streams"}
    waits = defaultdict[str, list[float]](list)
    for told in cluster.ended:
        kind = lengths.get(told.num_prompt_tokens, "documents")
        waits[kind].append(told.first_token_at - told.submitted_at)
    return Measured(
        gaps=[gap for told in cluster.ended for gap in told.gaps],
        chats=waits["chats"],
        documents=waits["documents"],
        tokens_per_second=cluster.num_tokens / cluster.now,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    seconds: float = parser.parse_args().seconds
    table = Table("load", "goal", "gap p50", "p99", "p99.9", "p99 / goal", title="milliseconds")
    for column in ("first token: chats p50", "p99", "documents p50", "p99", "tokens/s"):
        table.add_column(column)
    for load in (MIXED, CROWDED):
        for goal in (GOAL, 0.03, math.inf):
            found = run(load, goal, seconds)
            waits = [
                quantile(values, share)
                for values, shares in (
                    (found.gaps, (0.5, 0.99, 0.999)),
                    (found.chats, (0.5, 0.99)),
                    (found.documents, (0.5, 0.99)),
                )
                for share in shares
            ]
            cells = [f"{1000 * wait:.1f}" for wait in waits]
            ratio = f"{waits[1] / goal:.2f}" if math.isfinite(goal) else ""
            name = f"{1000 * goal:.0f}" if math.isfinite(goal) else "none"
            rate = f"{found.tokens_per_second:.0f}"
            table.add_row(load.name, name, *cells[:3], ratio, *cells[3:], rate)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
