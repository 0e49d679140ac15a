"""What the flight recorder costs: python -m tests.performance.bench_recorder

Prints the microseconds of a step of 256 decoding rows with and without it, how long the loop stands
still for a checkpoint of a full cache, and how long a recording takes to write.
"""

from __future__ import annotations

import gc
import random
import tempfile
import time
from pathlib import Path
from statistics import median

from mili.internal.v1.step_pb2 import Sampling, StepResult
from mili.router.limits import Limits
from mili.router.main import GC_THRESHOLD
from mili.router.params import GenerationParams
from mili.router.recorder import Recorder, read, write
from mili.router.replay import replay
from mili.router.request import Request
from mili.router.scheduler import Scheduler

ROWS, BLOCK_SIZE, CONTEXT = 256, 16, 4096


def main() -> None:
    """With and without in turn, as a die has it: the machine is not always equally fast."""
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)
    scheduler = Scheduler(Limits(40_000, BLOCK_SIZE, ROWS + 1, 8192, CONTEXT, 50_000))
    for number in range(ROWS):
        params = GenerationParams([number] * 200, Sampling(seed=1), max_tokens=3000)
        scheduler.add(Request(str(number), params, context_limit=CONTEXT))
    Recorder(100_000).watch("group", scheduler)
    tape = scheduler.tape
    generator = random.Random(1)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(2_500):
        recorded = generator.random() < 0.5
        scheduler.tape = tape if recorded else None
        started = time.process_time()
        _step(scheduler)
        seconds[recorded].append(time.process_time() - started)
    without, added = median(seconds[False]), median(seconds[True]) - median(seconds[False])
    print(f"schedule + update, {ROWS} rows: {without * 1e6:.0f} us")
    print(f"recorder: {added * 1e6:.1f} us a step, {added / ROWS * 1e6:.3f} us a token")
    for num_blocks in (22_000, 100_000):
        _checkpoint(num_blocks)


def _step(scheduler: Scheduler) -> None:
    command = scheduler.schedule()
    assert command is not None
    samples = [int(row.samples) for row in scheduler.in_flight[0].rows]
    scheduler.update(StepResult(step=command.step, num_new=samples, token_ids=[7] * sum(samples)))


def _checkpoint(num_blocks: int) -> None:
    """A pool full of conversations that share prefixes: 20 blocks to a span, as it comes."""
    generator = random.Random(1)
    scheduler = Scheduler(Limits(num_blocks, BLOCK_SIZE, ROWS + 1, 8192, CONTEXT, 50_000))
    prompts: list[list[int]] = []
    number = 0
    while scheduler.kv.usage().free > 0.1 * num_blocks:
        stem = generator.choice(prompts) if prompts and generator.random() < 0.7 else []
        stem = stem[: generator.randrange(0, len(stem) + 1, BLOCK_SIZE)] if stem else []
        prompts.append([*stem, *generator.choices(range(50_000), k=320)][:3000])
        params = GenerationParams(prompts[-1], Sampling(seed=1), max_tokens=1)
        number += 1
        scheduler.add(Request(str(number), params, context_limit=CONTEXT))
        while scheduler.waiting or scheduler.running:
            _step(scheduler)
    recorder = Recorder(10_000)
    started = time.process_time()
    recorder.watch("group", scheduler)
    stands = time.process_time() - started
    spans = sum(cell.kind == "radix_tree:Node" for cell in recorder.reels()[0].state)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording"
        started = time.perf_counter()
        write(path, recorder.reels())
        seconds = time.perf_counter() - started
        size = path.stat().st_size / 1e6
        assert [replay(reel).difference for reel in read(path)] == [None]
    print(
        f"{num_blocks} blocks in {spans} spans: checkpoint {stands * 1e3:.1f} ms, "
        f"written in {seconds:.2f} s, {size:.1f} MB"
    )


if __name__ == "__main__":
    main()
