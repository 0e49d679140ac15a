"""One line of the kernels' table, and how its time is taken.

Owns the clock. Does not know any kernel.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch

PEAK = {"GB/s": 3.0e12, "TFLOP/s": 798e12}  # per second, measured on the H100: facts, not datasheet
_SCALE = {"GB/s": 1e9, "TFLOP/s": 1e12}


class Line(NamedTuple):
    """share: of the card's measured limit."""

    kernel: str
    shape: str
    microseconds: float
    amount: float
    unit: Literal["GB/s", "TFLOP/s"]
    share: float


def line(
    kernel: str, shape: str, seconds: float, work: float, unit: Literal["GB/s", "TFLOP/s"]
) -> Line:
    """work: bytes that must move, or operations that must be done, in one call of `seconds`."""
    rate = work / seconds
    return Line(kernel, shape, seconds * 1e6, rate / _SCALE[unit], unit, rate / PEAK[unit])


def timed(functions: Sequence[Callable[[], object]], *, repeat: int = 20, runs: int = 5) -> float:
    """Median seconds of one call, from graph replays.

    functions: the same work on different inputs, in turn, so that no call finds its inputs in the
    cache because of the call before. repeat: rounds over all of them in one graph.
    """
    for function in functions:
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for function in functions:
                function()
    graph.replay()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times) / (repeat * len(functions))
