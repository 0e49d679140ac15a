"""What each row holds: known tokens, blocks, how much is computed, how to sample.

Owns the rows, and the check that router and worker agree on them. Does not know what a request is,
computes nothing, and never frees: a row is overwritten when it is admitted again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mili.internal.v1.step_pb2 import Admission, Sampling, StepCommand, Task

IntArray = npt.NDArray[np.int64]


class CommandError(Exception):
    """A command contradicts what this worker holds: router and worker have drifted apart.

    Nothing that this worker holds can be trusted any more, so the error ends it.
    """


class SequenceTable:
    """Arrays indexed by row. Row 0 is the null row: never admitted, its contents mean nothing.

    Memory of token_ids and block_table is taken from the machine when it is first touched.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        max_model_len: int,
        block_size: int,
        num_blocks: int,
        vocab_size: int,
    ) -> None:
        self.max_model_len = max_model_len
        self.block_size = block_size
        self._num_blocks = num_blocks
        self._vocab_size = vocab_size
        # One more than the limit: the last token may be sampled, and is never computed.
        self.token_ids = np.zeros((max_rows, max_model_len + 1), np.int64)
        self.block_table = np.zeros((max_rows, -(-max_model_len // block_size)), np.int64)
        self.num_blocks = np.zeros(max_rows, np.int64)
        self.num_known = np.zeros(max_rows, np.int64)
        self.num_computed = np.zeros(max_rows, np.int64)
        self.faulted = np.zeros(max_rows, np.bool_)
        self.sampling = [Sampling()] * max_rows
        # [blocks of the last command, 3]: row, index in the row's table, block.
        self.appended = np.zeros((0, 3), np.int32)

    def reset(self) -> None:
        """Forget every row: none is admitted any more."""
        self.num_known[:] = 0
        self.faulted[:] = False

    def apply(self, command: StepCommand) -> tuple[IntArray, IntArray, IntArray]:
        """Take over the command's admissions and blocks, and check its rows. Raises CommandError.

        Returns the command's rows, starts and counts, [rows] each. A row that is faulted is not
        checked: the router may have sent commands for it before it could know.
        """
        _require(not command.copies, "block copies are not supported")
        for admission in command.admissions:
            self._admit(admission)
        self._append_blocks(command.block_rows, command.block_ids)
        return self._check(command.rows, command.starts, command.num_tokens)

    def _admit(self, admission: Admission) -> None:
        row = admission.row
        _require(0 < row < len(self.num_known), f"there is no row {row}")
        _require(admission.task in (Task.TASK_UNSPECIFIED, Task.TASK_GENERATE), "unknown task")
        unsupported = (
            admission.adapter,
            admission.grammar,
            admission.HasField("num_logprobs"),
            admission.HasField("score_from"),
            admission.sampling.presence_penalty,
            admission.sampling.frequency_penalty,
            admission.sampling.bias_token_ids,
            admission.sampling.allowed_token_ids,
        )
        _require(not any(unsupported), f"row {row} asks for what this worker cannot do")
        token_ids = np.frombuffer(admission.token_ids, "<u4")
        _require(0 < len(token_ids) <= self.max_model_len, f"row {row}: {len(token_ids)} tokens")
        _require(int(token_ids.max()) < self._vocab_size, f"row {row}: token id out of range")
        suppressed = admission.sampling.suppressed_token_ids
        _require(max(suppressed, default=0) < self._vocab_size, f"row {row}: suppressed id")
        self.token_ids[row, : len(token_ids)] = token_ids
        self.num_known[row] = len(token_ids)
        self.num_blocks[row] = 0
        # A cached prefix counts as computed: the row's first step says how long it is.
        self.num_computed[row] = -1
        self.faulted[row] = False
        self.sampling[row] = admission.sampling

    def _append_blocks(self, block_rows: Sequence[int], block_ids: Sequence[int]) -> None:
        _require(len(block_rows) == len(block_ids), "block columns differ")
        rows, blocks = np.array(block_rows, np.int64), np.array(block_ids, np.int64)
        if not len(rows):
            self.appended = np.zeros((0, 3), np.int32)
            return
        _require_range(rows, len(self.num_known), "row")
        _require_range(blocks, self._num_blocks, "block")
        # Stable: the blocks of a row stay in order.
        order = np.argsort(rows, kind="stable")
        rows, blocks = rows[order], blocks[order]
        first = np.flatnonzero(np.diff(rows, prepend=-1))  # of each row
        counts = np.diff(first, append=len(rows))
        indices = self.num_blocks[rows] + np.arange(len(rows)) - np.repeat(first, counts)
        _require(indices.max() < self.block_table.shape[1], "a row has too many blocks")
        self.block_table[rows, indices] = blocks
        self.num_blocks[rows[first]] += counts
        self.appended = np.stack((rows, indices, blocks), axis=1).astype(np.int32)

    def _check(
        self, row_ids: Sequence[int], first: Sequence[int], num_tokens: Sequence[int]
    ) -> tuple[IntArray, IntArray, IntArray]:
        _require(len(row_ids) == len(first) == len(num_tokens), "row columns differ")
        _require(len(set(row_ids)) == len(row_ids), "a row is named twice")
        rows, starts = np.array(row_ids, np.int64), np.array(first, np.int64)
        counts = np.array(num_tokens, np.int64)
        ends = starts + counts
        _require(not len(rows) or 0 < rows.min() <= rows.max() < len(self.num_known), "no such row")
        computed = self.num_computed[rows]
        wrong = (
            ((starts != computed) & (computed >= 0))
            | (ends <= starts)
            | (ends > self.num_known[rows])
            | (ends > self.max_model_len)
            | (ends > self.num_blocks[rows] * self.block_size)
        ) & ~self.faulted[rows]
        if wrong.any():
            index = int(wrong.argmax())
            row = rows[index]
            raise CommandError(
                f"row {row} is to compute positions {starts[index]} to {ends[index]}, but has "
                f"{computed[index]} computed, {self.num_known[row]} known tokens and "
                f"{self.num_blocks[row]} blocks"
            )
        return rows, starts, counts

    def append_tokens(self, rows: IntArray, token_ids: IntArray) -> None:
        """Append each row's sampled token to what it knows."""
        self.token_ids[rows, self.num_known[rows]] = token_ids
        self.num_known[rows] += 1

    def advance(self, rows: IntArray, ends: IntArray, samples: npt.NDArray[np.bool_]) -> None:
        """The step that computes `rows` up to `ends` was launched; those of `samples`, [rows],
        will know one token more, which stays where it was sampled."""
        self.num_computed[rows] = ends
        self.num_known[rows[samples]] += 1


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CommandError(message)


def _require_range(ids: IntArray, end: int, what: str) -> None:
    """Id 0 is the null row's or the null block's."""
    wrong = ids[(ids <= 0) | (ids >= end)]
    _require(not len(wrong), f"there is no {what} {wrong[0] if len(wrong) else 0}")
