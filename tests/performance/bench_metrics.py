"""What metrics cost: python -m tests.performance.bench_metrics

Prints the microseconds that counting takes of each token, how long a scrape of many worker groups
takes, and by how much a busy loop is late while somebody scrapes all the time.
"""

from __future__ import annotations

import gc
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from statistics import median

from mili.internal.v1.step_pb2 import Sampling, StepCommand
from mili.router.errors import Reason
from mili.router.limits import Limits
from mili.router.meters import Meters
from mili.router.metrics import RouterCollector, serve_metrics
from mili.router.outcome import FinishReason
from mili.router.params import GenerationParams
from mili.router.request import Request
from mili.router.scheduler import Scheduler
from tests.serving import free_port

ROWS, GROUPS, TENANTS = 256, 64, 100


class Engine:
    """What a collector sees of a router with many groups and tenants."""

    def __init__(self) -> None:
        limits = Limits(1000, 16, ROWS + 1, 8192, 4096, 50_000)
        self.meters = Meters()
        self.schedulers: Mapping[str, Scheduler] = {
            f"worker-{number}": Scheduler(limits) for number in range(GROUPS)
        }
        self.num_queued = 0
        for name in self.schedulers:
            self.meters.group(name)
        for number in range(TENANTS):
            self.meters.ended[f"tenant-{number}", FinishReason.EOS] += 1
            self.meters.generation_tokens[f"tenant-{number}"] += 1
        for reason in Reason:
            self.meters.failed(reason)


def main() -> None:
    gc.freeze()
    _counting()
    engine = Engine()
    port = free_port()
    serve_metrics("127.0.0.1", port, RouterCollector(engine, "model"))
    url = f"http://127.0.0.1:{port}/metrics"
    started = time.perf_counter()
    size = len(urllib.request.urlopen(url).read())
    seconds = time.perf_counter() - started
    print(f"scrape, {GROUPS} groups, {TENANTS} tenants: {seconds * 1e3:.0f} ms, {size >> 10} KiB")
    quiet = _lateness(lambda: time.sleep(1.0))
    scraped = _lateness(lambda: urllib.request.urlopen(url).read())
    for name, late in (("not scraped", quiet), ("scraped without pause", scraped)):
        late.sort()
        p99 = late[int(0.99 * len(late))]
        print(f"loop late, {name}: p99 {p99 * 1e3:.2f} ms, at most {late[-1] * 1e3:.2f} ms")


def _counting() -> None:
    """What one step of all rows adds: its command, its result."""
    meters = Meters()
    group = meters.group("worker")
    params = GenerationParams([1] * 100, Sampling(seed=1), max_tokens=1000)
    news: list[tuple[Request, int | None]] = [
        (Request(str(number), params, context_limit=4096), 7) for number in range(ROWS)
    ]
    command = StepCommand(rows=[1] * ROWS, starts=[9] * ROWS, num_tokens=[1] * ROWS)
    seconds = []
    for number in range(2_000):
        started = time.perf_counter()
        group.sent(command)
        meters.stepped(group, news, 8_000, number * 0.008)
        seconds.append(time.perf_counter() - started)
    a_step = median(seconds) * 1e6
    print(f"counting: {a_step:.1f} us a step of {ROWS} rows, {a_step / ROWS:.3f} us a token")


def _lateness(other: Callable[[], object]) -> list[float]:
    """How late a loop wakes that works 1 ms of every 8 ms, while a thread does something else."""
    end = time.perf_counter() + 3.0

    def repeat() -> None:
        while time.perf_counter() < end:
            other()

    thread = threading.Thread(target=repeat)
    thread.start()
    late: list[float] = []
    due = time.perf_counter()
    while due < end:
        due += 0.008
        time.sleep(max(0.0, due - time.perf_counter()))
        late.append(max(0.0, time.perf_counter() - due))
        until = time.perf_counter() + 0.001
        while time.perf_counter() < until:
            pass
        due = max(due, time.perf_counter() - 0.008)
    thread.join()
    return late


if __name__ == "__main__":
    main()
