"""Chunks of prompts beside streams: the latency goal is kept, and nobody starves."""

from __future__ import annotations

import math
import random

import pytest

from mili.internal.v1.step_pb2 import Sampling, StepCommand, StepResult
from mili.router.limits import Limits
from mili.router.pace import LEAST_CHUNK
from mili.router.params import GenerationParams
from mili.router.request import Request
from mili.router.scheduler import Scheduler
from tests.performance.bench_itl import CROWDED, GOAL, MIXED, Load, run
from tests.performance.virtual_groups import quantile

STEP, TOKEN = 5e-3, 20e-6


class Core:
    """One scheduler, and a worker whose steps take STEP, and TOKEN for each of their tokens."""

    def __init__(self, itl_goal: float) -> None:
        self.scheduler = Scheduler(
            Limits(
                num_blocks=20_000, block_size=16, max_rows=300, max_step_tokens=8192,
                max_model_len=100_000, vocab_size=9,
            ),
            itl_goal=itl_goal,
        )  # fmt: skip
        self.added = 0

    def add(self, prompt_tokens: int) -> None:
        self.added += 1
        prompt = [self.added] * prompt_tokens
        params = GenerationParams(prompt, Sampling(seed=1), max_tokens=10_000)
        self.scheduler.add(Request(str(self.added), params, context_limit=100_000))

    def step(self, factor: float = 1.0) -> StepCommand:
        """Schedule a step, and give its result."""
        command = self.scheduler.schedule()
        assert command is not None
        rows = self.scheduler.in_flight[-1].rows
        samples = [int(row.samples) for row in rows]
        seconds = (STEP + TOKEN * sum(command.num_tokens)) * factor
        result = StepResult(step=command.step, num_new=samples, token_ids=[1] * sum(samples))
        result.device_microseconds = round(1e6 * seconds)
        self.scheduler.update(result)
        self.scheduler.check()
        return command


def warm(core: Core, streams: int) -> None:
    """Let it learn what steps cost: some prompts, and the streams that come of them."""
    for _ in range(streams):
        core.add(100)
    core.step()
    core.add(3000)
    for _ in range(200):
        core.step()


def test_without_streams_a_step_is_as_large_as_it_can_be() -> None:
    core = Core(0.05)
    core.add(20_000)
    assert [sum(core.step().num_tokens) for _ in range(3)] == [8192, 8192, 20_000 - 2 * 8192]


@pytest.mark.parametrize("goal", [0.02, 0.05])
def test_beside_streams_a_step_takes_as_long_as_the_goal(goal: float) -> None:
    core = Core(goal)
    warm(core, 20)
    core.add(20_000)
    for _ in range(4):
        command = core.step()
        assert len(command.rows) == 22, "a stream was left out"
        seconds = STEP + TOKEN * sum(command.num_tokens)
        assert 0.9 * goal < seconds < 1.05 * goal


def test_without_a_goal_nothing_is_cut() -> None:
    core = Core(math.inf)
    warm(core, 20)
    core.add(20_000)
    assert sum(core.step().num_tokens) == 8192


def test_streams_that_miss_the_goal_alone_leave_prompts_a_share() -> None:
    core = Core(0.004)
    warm(core, 20)
    core.add(2000)
    chunks = [max(core.step().num_tokens) for _ in range(3)]
    assert all(LEAST_CHUNK <= chunk <= 0.25 * 0.004 / TOKEN + 1 for chunk in chunks)
    for _ in range(100):
        core.step()
    assert len(core.scheduler.running) == 22
    assert all(each.num_output_tokens for each in core.scheduler.running.values())


def test_many_short_prompts_together_keep_the_goal_too() -> None:
    core = Core(0.03)
    warm(core, 20)
    for _ in range(100):
        core.add(200)
    for _ in range(3):
        seconds = STEP + TOKEN * sum(core.step().num_tokens)
        assert 0.025 < seconds < 0.032


def test_the_counts_hold_whatever_happens() -> None:
    rng, core = random.Random(1), Core(0.01)
    for _ in range(300):
        if rng.random() < 0.3:
            core.add(rng.randint(1, 3000))
        elif core.scheduler.running or core.scheduler.waiting:
            core.step(rng.choice((0.5, 1.0, 2.0)))
    assert core.added > 50


@pytest.mark.parametrize(("load", "most"), [(MIXED, 1.1), (CROWDED, 1.4)], ids=["mixed", "crowded"])
def test_a_mixed_load_keeps_the_goal_and_first_tokens_do_not_starve(
    load: Load, most: float
) -> None:
    with_goal = run(load, GOAL, 12.0)
    without = run(load, math.inf, 12.0)
    assert quantile(with_goal.gaps, 0.99) < most * GOAL
    assert quantile(without.gaps, 0.999) > 2 * GOAL, "a load that needs no goal"
    waits = [quantile([*each.chats, *each.documents], 0.99) for each in (with_goal, without)]
    assert waits[0] < 4 * waits[1] + 1.0, waits
