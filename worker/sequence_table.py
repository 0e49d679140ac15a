"""How much each row holds: known and computed tokens, blocks.

Owns the check that router and worker agree on the rows. Does not know what the tokens and blocks
are, computes nothing, and never frees: a row is overwritten when it is admitted again.

A step waits for `take` before it can be launched; `check` may come while the device works already,
if it comes before anybody hears of the step. Most steps that somebody waits for have few rows, and
for these plain lists are several times faster than arrays; for 256 they are as fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import lt
from typing import NamedTuple

import numpy as np

from mili.internal.v1.step_pb2 import Admission, StepCommand, Task
from mili.kernels.reference_sampling import MAX_BIASES
from mili.worker.readings import MAX_WIDTH, Wanted, wanted_of

TOKEN_BYTES = 4  # of an admission
_TASKS = (Task.TASK_UNSPECIFIED, Task.TASK_GENERATE, Task.TASK_EMBED, Task.TASK_SCORE)


class CommandError(Exception):
    """A command contradicts what this worker holds: router and worker have drifted apart.

    Nothing that this worker holds can be trusted any more, so the error ends it.
    """


class Taken(NamedTuple):
    """A command's rows, and its appended blocks."""

    rows: list[int]
    starts: list[int]
    counts: list[int]
    appended: list[int]  # row, index in the row's table and block of each, one after another


class SequenceTable:
    """Lists indexed by row. Row 0 is the null row: never admitted, its contents mean nothing."""

    def __init__(
        self,
        *,
        max_rows: int,
        max_model_len: int,
        block_size: int,
        num_blocks: int,
        vocab_size: int,
    ) -> None:
        self.max_rows = max_rows
        self.max_model_len = max_model_len
        self.max_row_blocks = -(-max_model_len // block_size)
        self.block_size = block_size
        self._max_blocks = num_blocks
        self.vocab_size = vocab_size
        self.num_blocks = [0] * max_rows
        self.num_known = [0] * max_rows
        # -1: admitted, and the first step will say how much of it is cached.
        self.num_computed = [0] * max_rows
        # Not checked: the router may have sent commands for them before it could know.
        self.faulted: set[int] = set()
        # Rows that are asked for more than tokens.
        self.wanted: dict[int, Wanted] = {}

    def reset(self) -> None:
        """Forget every row: none is admitted any more."""
        self.num_known = [0] * self.max_rows
        self.faulted.clear()
        self.wanted.clear()

    def take(self, command: StepCommand) -> Taken:
        """Count admissions and blocks: all that a launch needs. `check` must follow.

        Raises CommandError for a row that does not exist.
        """
        num_blocks = self.num_blocks
        appended: list[int] = []
        try:
            for admission in command.admissions:
                row = admission.row
                self.num_known[row] = len(admission.token_ids) // TOKEN_BYTES
                self.num_computed[row] = -1
                num_blocks[row] = 0
                self.faulted.discard(row)
                self.wanted.pop(row, None)
                if (wanted := wanted_of(admission)) is not None:
                    self.wanted[row] = wanted
            for row, block in zip(command.block_rows, command.block_ids, strict=False):
                index = num_blocks[row]
                num_blocks[row] = index + 1
                appended += (row, index, block)
        except IndexError as error:
            raise CommandError(f"there is no row {row}") from error
        rows, starts, counts = list(command.rows), list(command.starts), list(command.num_tokens)
        return Taken(rows, starts, counts, appended)

    def check(self, command: StepCommand, taken: Taken) -> None:
        """Does the command that was just taken fit what the rows hold? Raises CommandError."""
        _require(not command.copies, "block copies are not supported")
        for admission in command.admissions:
            self._check_admission(admission)
        self._check_blocks(list(command.block_rows), list(command.block_ids))
        self._check_rows(taken.rows, taken.starts, taken.counts)

    def advance(self, rows: Sequence[int], ends: Sequence[int], samples: Sequence[bool]) -> None:
        """The step that computes `rows` up to `ends` was launched; those of `samples`, [rows],
        will know one token more."""
        for row, end, sampled in zip(rows, ends, samples, strict=True):
            self.num_computed[row] = end
            self.num_known[row] += sampled

    def _check_admission(self, admission: Admission) -> None:
        row, sampling = admission.row, admission.sampling
        _require(row > 0, "there is no row {}", row)
        _require(admission.task in _TASKS, "unknown task")
        wanted = self.wanted.get(row)
        if wanted is not None:
            widest = max(wanted.sampled_width, wanted.scored_width)
            _require(widest <= MAX_WIDTH, "row {}: too many alternatives", row)
            _require(not wanted.scored or wanted.scored.start > 0, "row {}: score_from 0", row)
        _require(not admission.adapter, "row {} asks for what this worker cannot do", row)
        _require(len(admission.token_ids) % TOKEN_BYTES == 0, "row {}: half a token id", row)
        token_ids = np.frombuffer(admission.token_ids, "<u4")
        _require(0 < len(token_ids) <= self.max_model_len, "row {}: {} tokens", row, len(token_ids))
        _require(int(token_ids.max()) < self.vocab_size, "row {}: token id out of range", row)
        _require(admission.num_prompt_tokens <= len(token_ids), "row {}: no such prompt", row)
        for ids in (sampling.suppressed_token_ids, sampling.allowed_token_ids):
            if ids:
                _require(max(ids) < self.vocab_size, "row {}: suppressed or allowed id", row)
        if sampling.bias_token_ids or sampling.biases:
            self._check_biases(row, list(sampling.bias_token_ids), len(sampling.biases))

    def _check_biases(self, row: int, token_ids: list[int], num_biases: int) -> None:
        _require(len(token_ids) == num_biases <= MAX_BIASES, "row {}: biases", row)
        rising = all(map(lt, token_ids, [*token_ids[1:], self.vocab_size]))
        _require(rising, "row {}: bias ids must rise, and end in the vocabulary", row)

    def _check_blocks(self, rows: list[int], blocks: list[int]) -> None:
        """rows, blocks: of what was appended."""
        _require(len(rows) == len(blocks), "block columns differ")
        if not rows:
            return
        _require(0 not in rows, "there is no row 0")
        for block in (min(blocks), max(blocks)):
            _require(0 < block < self._max_blocks, "there is no block {}", block)
        longest = max(self.num_blocks[row] for row in rows)
        _require(longest <= self.max_row_blocks, "a row has too many blocks")

    def _check_rows(self, rows: list[int], starts: list[int], counts: list[int]) -> None:
        _require(len(rows) == len(starts) == len(counts), "row columns differ")
        _require(len(set(rows)) == len(rows), "a row is named twice")
        _require(not rows or 0 < min(rows) <= max(rows) < self.max_rows, "no such row")
        for row, start, count in zip(rows, starts, counts, strict=True):
            computed, end = self.num_computed[row], start + count
            agrees = start == computed or computed < 0
            room = min(self.num_blocks[row] * self.block_size, self.max_model_len)
            fits = start < end <= room and end <= self.num_known[row]
            if not (agrees and fits) and row not in self.faulted:
                raise CommandError(
                    f"row {row} is to compute positions {start} to {end}, but has {computed} "
                    f"computed, {self.num_known[row]} known tokens and {self.num_blocks[row]} "
                    "blocks"
                )


def _require(condition: bool, message: str, *values: int) -> None:
    """values fill the message's {}."""
    if not condition:
        raise CommandError(message.format(*values))
