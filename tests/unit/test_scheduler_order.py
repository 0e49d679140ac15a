"""Who comes first inside a step: budget and blocks go by priority, and nobody who runs starves."""

from __future__ import annotations

from mili.internal.v1.step_pb2 import Sampling, StepCommand, StepResult
from mili.router.limits import Limits
from mili.router.params import GenerationParams, Scheduling
from mili.router.request import Request
from mili.router.scheduler import Scheduler

LIMITS = Limits(
    num_blocks=100, block_size=4, max_rows=9, max_step_tokens=16, max_model_len=200, vocab_size=9
)


class Driver:
    """A scheduler, and a worker that answers 7 to everything."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.scheduler = Scheduler(limits)
        self.arrivals = 0

    def add(self, num_tokens: int, priority: int = 0) -> Request:
        self.arrivals += 1
        params = GenerationParams(
            [self.arrivals] * num_tokens,
            Sampling(),
            max_tokens=150,
            scheduling=Scheduling(priority=priority),
        )
        limit = self.scheduler.context_limit
        name = f"r{self.arrivals}"
        request = Request(name, params, context_limit=limit, arrival=self.arrivals)
        self.scheduler.add(request)
        return request

    def step(self) -> dict[Request, int]:
        """Tokens that the next step computed of each request."""
        command = self.scheduler.schedule()
        assert isinstance(command, StepCommand)
        rows = self.scheduler.in_flight[0].rows
        computed = {row.request: count for row, count in zip(rows, command.num_tokens, strict=True)}
        samples = [int(row.samples) for row in rows]
        result = StepResult(step=command.step, num_new=samples, token_ids=[7] * sum(samples))
        self.scheduler.update(result)
        self.scheduler.check()
        return computed


def test_a_long_prompt_takes_no_token_from_those_who_run() -> None:
    driver = Driver()
    running = [driver.add(2) for _ in range(4)]
    driver.step()
    urgent = driver.add(100, priority=1)
    driver.step()
    assert driver.scheduler.running.first is urgent
    assert driver.step() == {urgent: 12} | dict.fromkeys(running, 1)


def test_blocks_are_taken_from_the_least_urgent() -> None:
    driver = Driver(LIMITS._replace(num_blocks=31, max_model_len=120))
    low, usual = driver.add(30, priority=-1), driver.add(30)
    while not (low.row and usual.row):
        driver.step()
    urgent = driver.add(30, priority=1)
    while not low.num_preemptions:
        driver.step()
    assert urgent.row and usual.row
    assert [each.num_preemptions for each in (low, usual, urgent)] == [1, 0, 0]
    assert list(driver.scheduler.running) == [urgent.request_id, usual.request_id]
    assert driver.scheduler.preempted == [low]


def test_an_urgent_newcomer_goes_before_one_that_was_preempted() -> None:
    driver = Driver(LIMITS._replace(num_blocks=31, max_model_len=120))
    first, second = driver.add(40), driver.add(40)
    while not second.num_preemptions:
        driver.step()
    urgent, usual = driver.add(4, priority=1), driver.add(4)
    assert driver.scheduler.waiting.values() == [urgent, second, usual]
    assert first.num_preemptions == 0


def test_a_suspect_waits_for_the_step_that_computes_another() -> None:
    driver = Driver()
    scheduler = driver.scheduler
    driver.add(20)
    driver.add(4, priority=1)
    urgent, other = sorted(scheduler.withdraw(), key=lambda each: each.arrival, reverse=True)
    for suspect in (urgent, other):
        suspect.deaths = 2
    scheduler.add(other)
    executing = scheduler.schedule()
    assert executing is not None and other.row
    scheduler.preempt_all()
    scheduler.add(urgent)
    assert scheduler.schedule() is None
    scheduler.update(StepResult(step=executing.step, num_new=[0]))
    assert scheduler.schedule() is not None and urgent.row
