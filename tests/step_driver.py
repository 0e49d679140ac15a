"""A router in twenty lines: drives a ModelRunner row by row, with blocks in any order.

Owns what a router would know of its rows. Does not decide anything.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mili.hub.folder import read_model_folder
from mili.internal.v1.step_pb2 import TASK_GENERATE, Admission, Sampling, StepCommand, StepResult
from mili.worker.config import WorkerConfig
from mili.worker.runner import ModelRunner


class StepDriver:
    """tokens[row] is everything that is known of a row; computed[row] how much of it is in KV."""

    def __init__(self, folder: Path, **settings: Any) -> None:  # noqa: ANN401
        defaults = {"dtype": "float32", "num_gpu_blocks_override": 400, "num_threads": 1}
        config = WorkerConfig(model=str(folder), **(defaults | settings))
        self.runner = ModelRunner(read_model_folder(folder), config)
        self.block_size = config.block_size
        self.free = list(range(1, self.runner.ready().num_blocks))
        random.Random(7).shuffle(self.free)
        self.tokens: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.blocks: dict[int, list[int]] = {}
        self._next = StepCommand(step=1)

    def admit(
        self,
        row: int,
        token_ids: Sequence[int],
        sampling: Sampling | None = None,
        *,
        shared: Sequence[int] = (),
    ) -> None:
        """Admit a row with the next step. shared: blocks whose KV is computed already."""
        self._next.admissions.append(
            Admission(
                row=row,
                admission=len(self.tokens) + 1,
                token_ids=np.array(token_ids, "<u4").tobytes(),
                num_prompt_tokens=len(token_ids),
                task=TASK_GENERATE,
                sampling=sampling,
            )
        )
        self.tokens[row] = list(token_ids)
        self.blocks[row] = []
        self.computed[row] = len(shared) * self.block_size
        for block in shared:
            self._add_block(row, block)

    def _add_block(self, row: int, block: int) -> None:
        self.blocks[row].append(block)
        self._next.block_rows.append(row)
        self._next.block_ids.append(block)

    def step(self, counts: dict[int, int]) -> StepResult:
        """Compute counts[row] tokens of each row, in the given order."""
        command = self._next
        for row, count in counts.items():
            end = self.computed[row] + count
            while len(self.blocks[row]) * self.block_size < end:
                self._add_block(row, self.free.pop())
            command.rows.append(row)
            command.starts.append(self.computed[row])
            command.num_tokens.append(count)
            self.computed[row] = end
        self._next = StepCommand(step=command.step + 1)
        result = self.runner.execute(command)
        new = iter(result.token_ids)
        for row, num_new in zip(counts, result.num_new, strict=True):
            self.tokens[row].extend(next(new) for _ in range(num_new))
        assert next(new, None) is None
        return result

    def run(self, rows: Sequence[int], output_tokens: int, chunk: int = 1000) -> None:
        """Compute the rows together until each has so many tokens more than it has now."""
        wanted = {row: len(self.tokens[row]) + output_tokens for row in rows}
        while counts := {
            row: min(len(self.tokens[row]) - self.computed[row], chunk)
            for row in rows
            if len(self.tokens[row]) < wanted[row]
        }:
            self.step(counts)
