"""What waiting costs: scheduling a step, and the queue's own operations, over how many wait.

python -m tests.performance.bench_queue
"""

from __future__ import annotations

import time
from collections.abc import Callable

from mili.internal.v1.step_pb2 import Sampling, StepResult
from mili.router.fair_share import FairShare
from mili.router.limits import Limits
from mili.router.params import GenerationParams, Scheduling
from mili.router.queue import WaitingQueue
from mili.router.request import Request
from mili.router.scheduler import Scheduler

ROWS = 256
LIMITS = Limits(
    num_blocks=ROWS * 64 + 1,
    block_size=16,
    max_rows=ROWS + 1,
    max_step_tokens=8192,
    max_model_len=1024,
    vocab_size=100,
)


def make_request(number: int, tenants: int) -> Request:
    scheduling = Scheduling(tenant=f"t{number % tenants}")
    params = GenerationParams([2] * 33, Sampling(), max_tokens=900, scheduling=scheduling)
    return Request(f"r{number}", params, context_limit=1024, arrival=number)


def microseconds(work: Callable[[], object], count: int, repeats: int = 5) -> float:
    """Of one call of `work`, which does `count` things: the best of several."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best / count * 1e6


def step_cost(waiting: int, tenants: int) -> float:
    """Of schedule + update with all rows decoding, while others wait."""
    scheduler = Scheduler(LIMITS)
    for number in range(ROWS + waiting):
        scheduler.add(make_request(number, tenants))

    def step() -> None:
        command = scheduler.schedule()
        assert command is not None
        samples = [int(row.samples) for row in scheduler.in_flight[0].rows]
        tokens = [7] * sum(samples)
        scheduler.update(StepResult(step=command.step, num_new=samples, token_ids=tokens))

    for _ in range(5):
        step()
    assert len(scheduler.running) == ROWS
    return microseconds(lambda: [step() for _ in range(20)], 20)


def queue_costs(waiting: int, tenants: int) -> tuple[float, float, float, float]:
    """Of one request going in, being found next and going out, being estimated, and its place."""
    shares = FairShare()
    queue = WaitingQueue(shares)
    for number in range(waiting + 100):
        request = make_request(number, tenants)
        request.account = shares.account(request.params.scheduling.tenant, 1.0)
        if number < waiting:
            queue.add(request)
    others = [make_request(waiting + number, tenants) for number in range(100)]
    for request in others:
        request.account = shares.account(request.params.scheduling.tenant, 1.0)

    def come_and_go() -> None:
        for request in others:
            queue.add(request)
        for request in others:
            queue.remove(request)

    first = microseconds(lambda: [queue.first(suspects=True) for _ in others], 100)
    ahead = microseconds(lambda: [queue.cost_ahead(request) for request in others], 100)
    head = queue.first(suspects=True)
    assert head is not None
    place = microseconds(lambda: [queue.position(head) for _ in others], 100)
    return microseconds(come_and_go, 100), first, ahead, place


def main() -> None:
    print("| waiting | tenants | step of 256 rows | in and out | next | estimate | position |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for waiting, tenants in ((1, 1), (100, 1), (10_000, 1), (100_000, 1), (10_000, 10),
                             (10_000, 100), (10_000, 1000)):  # fmt: skip
        figures = (step_cost(waiting, tenants), *queue_costs(waiting, tenants))
        print(
            f"| {waiting} | {tenants} | " + " | ".join(f"{each:.1f} us" for each in figures) + " |"
        )


if __name__ == "__main__":
    main()
