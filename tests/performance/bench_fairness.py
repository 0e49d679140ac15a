"""What nine light tenants notice of one that sends ten times as much.

    python -m tests.performance.bench_fairness [--share PART] [--seconds SECONDS]

On the virtual clock, as bench_overload. Each light tenant asks for `share` of the capacity, the
heavy one for ten times that. Compared are the light tenants without and with the heavy one, and
what they would notice of it if all were served in the order in which they come.
"""

from __future__ import annotations

import argparse
import random
from typing import NamedTuple

from mili.router.params import Scheduling
from tests.performance.bench_overload import WARM_UP, capacity
from tests.virtual_cluster import Call, VirtualCluster, percentile, poisson, random_call

LIGHT = [f"light-{number}" for number in range(9)]
HEAVY = "heavy"


class Figures(NamedTuple):
    """Of the light tenants: seconds, refused calls, and the heavy one's output tokens a second."""

    latency_p50: float
    latency_p99: float
    ttft_p99: float
    refused: int
    heavy_goodput: float


def measure(
    rate: float, seconds: float, *, heavy: bool, fair: bool = True, seed: int = 1
) -> Figures:
    """rate: calls a second of one light tenant. fair: each tenant has an account of its own."""
    source = random.Random(seed)
    cluster = VirtualCluster(max_queue_time=10.0, max_queued_requests=1024)
    end = WARM_UP + seconds
    calls: dict[str, list[Call]] = {}
    for tenant in (*LIGHT, HEAVY) if heavy else LIGHT:
        times = poisson(source, rate * (10 if tenant == HEAVY else 1), 0.0, end)
        scheduling = Scheduling(tenant=tenant if fair else "everyone")
        calls[tenant] = [cluster.call(at, random_call(source, scheduling)) for at in times]
    cluster.run(until=end + 60.0)
    light = [call for tenant in LIGHT for call in calls[tenant] if call.at >= WARM_UP]
    done = [call for call in light if call.completed]
    greedy = [call for call in calls.get(HEAVY, []) if call.completed and call.at >= WARM_UP]
    return Figures(
        latency_p50=percentile([call.latency for call in done], 50),
        latency_p99=percentile([call.latency for call in done], 99),
        ttft_p99=percentile([call.time_to_first_token for call in done], 99),
        refused=sum(call.error is not None for call in light),
        heavy_goodput=sum(len(call.token_times) for call in greedy) / seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.07)
    parser.add_argument("--seconds", type=float, default=120.0)
    arguments = parser.parse_args()
    rate = arguments.share * capacity(30.0).calls_per_second
    print(f"light: {rate:.2f} calls/s each, heavy: {10 * rate:.2f} calls/s")
    print(f"offered together: {19 * arguments.share:.2f} of the capacity\n")
    print("| | p50 latency | p99 latency | p99 / alone | p99 TTFT | refused | heavy |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    alone = measure(rate, arguments.seconds, heavy=False)
    for name, figures in (
        ("nine light alone", alone),
        ("with the heavy one", measure(rate, arguments.seconds, heavy=True)),
        ("the same, in order of arrival", measure(rate, arguments.seconds, heavy=True, fair=False)),
    ):
        print(
            f"| {name} | {figures.latency_p50:.2f} s | {figures.latency_p99:.2f} s "
            f"| {figures.latency_p99 / alone.latency_p99:.2f} | {figures.ttft_p99 * 1e3:.0f} ms "
            f"| {figures.refused} | {figures.heavy_goodput:.0f} tok/s |"
        )


if __name__ == "__main__":
    main()
