"""What becomes of latency and goodput when more is asked than one worker group can do.

    python -m tests.performance.bench_overload [--max-queue-time SECONDS] [--seconds SECONDS]

On the virtual clock, with the cost of a step of Qwen3-8B on an H100 and 64 rows: the engine and all
below it are real, the worker only takes time. Calls come by a Poisson process, 64 to 448 prompt
tokens, 32 to 224 output tokens, which the router does not know before. Goodput is output tokens a
second of calls that completed.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from typing import NamedTuple

from mili.router.errors import RequestError
from tests.virtual_cluster import Call, VirtualCluster, percentile, poisson, random_call

WARM_UP = 10.0
# What a refusal may take, and how long after an overload things may take to be as before: seconds.
REFUSAL_SECONDS = 0.020
RECOVERY_SECONDS = 5.0


class Figures(NamedTuple):
    """calls_per_second: completed. refusal: the longest, in seconds of this machine's time."""

    goodput: float
    calls_per_second: float
    ttft_p50: float
    ttft_p99: float
    reasons: Counter[str]
    refusal: float


class TimedCluster(VirtualCluster):
    """Also takes down how long a refusal takes here, in real seconds."""

    def __init__(self, max_queue_time: float) -> None:
        super().__init__(max_queue_time=max_queue_time)
        self.refusals: list[float] = [0.0]
        submit = self.engine.submit

        def timed(*arguments: object) -> None:
            begin = time.perf_counter()
            try:
                submit(*arguments)  # type: ignore[arg-type]
            except RequestError:
                self.refusals.append(time.perf_counter() - begin)
                raise

        self.engine.submit = timed  # type: ignore[method-assign, assignment]


def measure(rate: float, max_queue_time: float, seconds: float, seed: int = 1) -> Figures:
    """Offer `rate` calls a second for so long; the first WARM_UP seconds do not count."""
    source = random.Random(seed)
    cluster = TimedCluster(max_queue_time)
    end = WARM_UP + seconds
    calls = [cluster.call(at, random_call(source)) for at in poisson(source, rate, 0.0, end)]
    cluster.run(until=end)
    completed = [call for call in calls if call.completed and (call.ended_at or 0) > WARM_UP]
    admitted = [call for call in calls if call.at >= WARM_UP and call.token_times]
    waits = [call.time_to_first_token for call in admitted]
    return Figures(
        goodput=sum(len(call.token_times) for call in completed) / seconds,
        calls_per_second=len(completed) / seconds,
        ttft_p50=percentile(waits, 50),
        ttft_p99=percentile(waits, 99),
        reasons=Counter(str(call.error) for call in calls if call.error and call.at >= WARM_UP),
        refusal=percentile(cluster.refusals, 99),
    )


def capacity(seconds: float) -> Figures:
    """What is done while there is always enough to do, and nobody is ever refused."""
    source = random.Random(1)
    cluster = TimedCluster(1e9)
    end = WARM_UP + seconds
    calls = [cluster.call(0.0, random_call(source)) for _ in range(int(200 * end))]
    cluster.run(until=end)
    completed = [call for call in calls if call.completed and (call.ended_at or 0) > WARM_UP]
    tokens = sum(len(call.token_times) for call in completed)
    return Figures(tokens / seconds, len(completed) / seconds, 0.0, 0.0, Counter(), 0.0)


def recovery(rate: float, limit: float, max_queue_time: float, seconds: float = 20.0) -> float:
    """Seconds from the end of so many at 5 times `rate` until calls at 80 % of it fare well again.

    That is: the last call that was refused, or waited for its first token for longer than `limit`.
    """
    source = random.Random(2)
    cluster = TimedCluster(max_queue_time)
    calls: list[Call] = []
    for load, begin, end in ((5.0, 0.0, seconds), (0.8, seconds, 2 * seconds)):
        times = poisson(source, load * rate, begin, end)
        calls += [cluster.call(at, random_call(source)) for at in times]
    cluster.run(until=3 * seconds)
    bad = (call.at for call in calls if call.error or call.time_to_first_token > limit)
    return max(0.0, max(bad) - seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-queue-time", type=float, help="default: p99 TTFT at 80 %% load")
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    full = capacity(arguments.seconds)
    rate = full.calls_per_second
    print(f"capacity: {full.goodput:.0f} output tokens/s, {rate:.1f} calls/s")
    relaxed = measure(0.8 * rate, 10.0, arguments.seconds)
    limit = arguments.max_queue_time or relaxed.ttft_p99
    print(f"80 % load: p99 TTFT {relaxed.ttft_p99 * 1e3:.0f} ms; max_queue_time {limit:.3f} s\n")
    print(
        "| load | goodput | of capacity | p50 TTFT | p99 TTFT | p99 / at 80 % | refused | refusal |"
    )
    print("|--:|--:|--:|--:|--:|--:|---|--:|")
    for load in (0.8, 1.0, 2.0, 5.0):
        figures = measure(load * rate, limit, arguments.seconds)
        refused = ", ".join(f"{reason} {n}" for reason, n in figures.reasons.items())
        print(
            f"| {load:g} | {figures.goodput:.0f} tok/s | {figures.goodput / full.goodput:.1%} "
            f"| {figures.ttft_p50 * 1e3:.0f} ms | {figures.ttft_p99 * 1e3:.0f} ms "
            f"| {figures.ttft_p99 / relaxed.ttft_p99:.2f} | {refused} "
            f"| {figures.refusal * 1e3:.2f} ms |"
        )
    seconds = recovery(rate, 2 * relaxed.ttft_p99, limit)
    print(f"\nrecovery from 5 times to 80 %: {seconds:.1f} s (goal {RECOVERY_SECONDS:g} s)")


if __name__ == "__main__":
    main()
