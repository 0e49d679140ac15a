"""Steps recorded as CUDA graphs, one for each size of step.

Owns the recorded graphs and when one is recorded. Does not know what the work computes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

Work = Callable[[], None]


class Graphs:
    """Replays the work of a key; the first time, does it and records it.

    All graphs share one memory pool: they run one after another on one stream, which must not be
    the default one.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._pool = torch.cuda.graph_pool_handle()
        self._recorded: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def run(self, key: Hashable, work: Work) -> None:
        """Do the work of `key` on the current stream: the same launches whenever it is called.

        Steps may be in flight while it is recorded, and another thread may wait for their events.
        """
        graph = self._recorded.get(key)
        if graph is not None:
            graph.replay()
            return
        # Loading a kernel is illegal while recording: the first time is a plain one.
        work()
        if self._enabled:
            self._recorded[key] = self._record(work)

    def _record(self, work: Work) -> torch.cuda.CUDAGraph:
        # Not `torch.cuda.graph`, which empties the allocator's caches each time.
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
        return graph
