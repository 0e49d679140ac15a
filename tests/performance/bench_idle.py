"""How long the GPU waits between decode steps, from the events around each step.

    python -m tests.performance.bench_idle --model qwen3-8b [--batch 1] [--steps 200]

Drives a GPU runner with random weights as the router does, two commands in flight. Idle is what
lies between the event that ends a step and the one that begins the next, on the device's clock;
gaps between the kernels of one step are not in it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from mili.internal.v1.step_pb2 import StepCommand
from mili.worker.cuda.pending_step import PendingStep
from tests.gpu.steps import GREEDY
from tests.performance.qwen3 import MODELS, Model, write_folder
from tests.step_driver import StepDriver

PROMPT_TOKENS = 512
DEPTH = 2
_ROUND = 16  # steps


class Idle(NamedTuple):
    """step, idle: milliseconds, medians over the steps."""

    step: float
    idle: float
    share: float  # of all the time


def measure_idle(pending: Sequence[PendingStep]) -> Idle:
    """The steps in the order in which they ran, all ended."""
    steps = [each.slot.started.elapsed_time(each.slot.ended) for each in pending[1:]]
    gaps = [
        before.slot.ended.elapsed_time(after.slot.started) for before, after in pairwise(pending)
    ]
    total = sum(steps) + sum(gaps)
    return Idle(statistics.median(steps), statistics.median(gaps), sum(gaps) / total)


def decode(model: Model, batch: int, steps: int, folder: Path) -> Idle:
    write_folder(folder, model)
    driver = StepDriver(
        folder,
        device="cuda",
        dtype="bfloat16",
        load_format="random",
        num_gpu_blocks_override=2 + batch * (PROMPT_TOKENS + steps + 64) // 16 + batch,
    )
    driver.runner.warm_up()
    driver.restart()
    rows = list(range(1, batch + 1))
    for row in rows:
        prompt = [random.randrange(model.vocab_size) for _ in range(PROMPT_TOKENS)]
        driver.admit(row, prompt, GREEDY)
        driver.step({row: PROMPT_TOKENS})
    driver.run(rows, _ROUND, depth=DEPTH)
    found = [_measure_round(driver, rows) for _ in range(steps // _ROUND)]
    return Idle(*(statistics.median(column) for column in zip(*found, strict=True)))


def _measure_round(driver: StepDriver, rows: Sequence[int]) -> Idle:
    """Slots are a ring: what was measured is read before it comes round."""
    launched: list[PendingStep] = []
    start = driver.runner.start

    def note(command: StepCommand) -> PendingStep:
        launched.append(start(command))
        return launched[-1]

    driver.runner.start = note
    driver.run(rows, _ROUND, depth=DEPTH)
    driver.runner.start = start
    return measure_idle(launched)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=192)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = MODELS[arguments.model]
        idle = decode(model, arguments.batch, arguments.steps, Path(name) / "model")
    Console().print(
        f"{arguments.model}, batch {arguments.batch}: a step takes {idle.step:.3f} ms, then the "
        f"GPU waits {1000 * idle.idle:.1f} us; {100 * idle.share:.2f} % of the time idle"
    )


if __name__ == "__main__":
    main()
