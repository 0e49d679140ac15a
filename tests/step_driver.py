"""A small router: drives a runner row by row, with blocks in any order.

Owns what a router would know of its rows. Does not decide anything.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mili.hub.folder import read_model_folder
from mili.internal.v1.step_pb2 import TASK_GENERATE, Admission, Sampling, StepCommand, StepResult
from mili.worker.completion import PendingStep
from mili.worker.config import WorkerConfig
from mili.worker.main import load_runner


class Sent(NamedTuple):
    rows: tuple[int, ...]
    pending: PendingStep


class StepDriver:
    """tokens[row] is everything that is known of a row; computed[row] how much of it is in KV."""

    def __init__(self, folder: Path, **settings: Any) -> None:  # noqa: ANN401
        defaults = {"dtype": "float32", "num_gpu_blocks_override": 400, "num_threads": 1}
        config = WorkerConfig(model=str(folder), **(defaults | settings))
        files = config.load_format == "auto"
        self.runner: Any = load_runner(read_model_folder(folder, weights=files), config)
        self.block_size = config.block_size
        self._begin()

    def restart(self) -> None:
        """Begin a new epoch: every row is forgotten, every block free."""
        self.runner.reset()
        self._begin()

    def _begin(self) -> None:
        self.free = list(range(1, self.runner.ready().num_blocks))
        random.Random(7).shuffle(self.free)
        self.tokens: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.blocks: dict[int, list[int]] = {}
        # Tokens of a row, those that a step in flight will sample included.
        self._known: dict[int, int] = {}
        self._in_flight: deque[Sent] = deque()
        self._num_admissions = 0
        self._next = StepCommand(step=1)

    def admit(
        self,
        row: int,
        token_ids: Sequence[int],
        sampling: Sampling | None = None,
        *,
        shared: Sequence[int] = (),
        num_prompt_tokens: int | None = None,
        grammar: int = 0,
    ) -> None:
        """Admit a row with the next step. shared: blocks whose KV is computed already.

        num_prompt_tokens: None where there is no output yet. grammar: the number of one that was
        prepared.
        """
        self._num_admissions += 1
        self._next.admissions.append(
            Admission(
                row=row,
                admission=self._num_admissions,
                token_ids=np.array(token_ids, "<u4").tobytes(),
                num_prompt_tokens=(
                    len(token_ids) if num_prompt_tokens is None else num_prompt_tokens
                ),
                task=TASK_GENERATE,
                sampling=sampling,
                grammar=grammar,
            )
        )
        self.tokens[row] = list(token_ids)
        self._known[row] = len(token_ids)
        self.blocks[row] = []
        self.computed[row] = len(shared) * self.block_size
        for block in shared:
            self._add_block(row, block)

    def _add_block(self, row: int, block: int) -> None:
        self.blocks[row].append(block)
        self._next.block_rows.append(row)
        self._next.block_ids.append(block)

    def send(self, counts: dict[int, int]) -> None:
        """Begin a step that computes counts[row] tokens of each row, in the given order."""
        command = self._next
        for row, count in counts.items():
            end = self.computed[row] + count
            while len(self.blocks[row]) * self.block_size < end:
                self._add_block(row, self.free.pop())
            command.rows.append(row)
            command.starts.append(self.computed[row])
            command.num_tokens.append(count)
            self.computed[row] = end
            self._known[row] += end == self._known[row]
        self._next = StepCommand(step=command.step + 1)
        self._in_flight.append(Sent(tuple(counts), self.runner.start(command)))

    def receive(self) -> StepResult:
        """Wait for the oldest step in flight, and take its tokens."""
        rows, pending = self._in_flight.popleft()
        result: StepResult = pending.result()
        new = iter(result.token_ids)
        for row, num_new in zip(rows, result.num_new, strict=True):
            self.tokens[row].extend(next(new) for _ in range(num_new))
        assert next(new, None) is None
        return result

    def step(self, counts: dict[int, int]) -> StepResult:
        """Send a step, and receive it."""
        assert not self._in_flight
        self.send(counts)
        return self.receive()

    def run(
        self, rows: Sequence[int], output_tokens: int, chunk: int = 1000, depth: int = 1
    ) -> None:
        """Compute the rows together until each has so many tokens more than it has now.

        depth: steps in flight.
        """
        wanted = {row: self._known[row] + output_tokens for row in rows}
        while counts := {
            row: min(self._known[row] - self.computed[row], chunk)
            for row in rows
            if self._known[row] < wanted[row]
        }:
            self.send(counts)
            if len(self._in_flight) == depth:
                self.receive()
        while self._in_flight:
            self.receive()
