"""What each row holds on a CPU: beside the counters its tokens, its block table and its sampling.

Owns these. Does not know how they are checked: that is worker/sequence_table.py, for any
device.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from mili.internal.v1.step_pb2 import Admission, Sampling, StepCommand
from mili.kernels.reference_sampling import pack_mask
from mili.worker.sequence_table import SequenceTable, Taken

IntArray = npt.NDArray[np.int64]


class CpuSequenceTable(SequenceTable):
    """Memory of token_ids and block_table is taken from the machine when it is first touched.

    edited: the rows whose logits are changed before a token is drawn. allowed_mask: of those that
    may not draw every token, [words] int32 each.
    """

    def __init__(self, **sizes: int) -> None:
        """sizes: as SequenceTable takes them."""
        super().__init__(**sizes)
        # One more than the limit: the last token may be sampled, and is never computed.
        self.token_ids = np.zeros((self.max_rows, self.max_model_len + 1), np.int64)
        self.block_table = np.zeros((self.max_rows, self.max_row_blocks), np.int64)
        self.sampling = [Sampling()] * self.max_rows
        self.num_prompt_tokens = np.zeros(self.max_rows, np.int64)
        self.edited: set[int] = set()
        self.allowed_mask: dict[int, torch.Tensor] = {}

    def apply(self, command: StepCommand) -> Taken:
        """Take a command over, and check it first. Raises CommandError."""
        taken = self.take(command)
        self.check(command, taken)
        for admission in command.admissions:
            self._admit(admission)
        rows, indices, blocks = np.array(taken.appended, np.int64).reshape(-1, 3).T
        self.block_table[rows, indices] = blocks
        return taken

    def _admit(self, admission: Admission) -> None:
        row, sampling = admission.row, admission.sampling
        token_ids = np.frombuffer(admission.token_ids, "<u4")
        self.token_ids[row, : len(token_ids)] = token_ids
        self.num_prompt_tokens[row] = admission.num_prompt_tokens
        self.sampling[row] = sampling
        self.edited.discard(row)
        if _edits(sampling):
            self.edited.add(row)
        self.allowed_mask.pop(row, None)
        if sampling.allowed_token_ids:
            self.allowed_mask[row] = pack_mask(sampling.allowed_token_ids, self.vocab_size)

    def known(self, rows: IntArray) -> IntArray:
        """Known tokens of each row."""
        return np.array([self.num_known[row] for row in rows.tolist()], np.int64)

    def is_faulted(self, rows: IntArray) -> npt.NDArray[np.bool_]:
        """Whether each row is."""
        return np.array([row in self.faulted for row in rows.tolist()], np.bool_)

    def generates(self, rows: IntArray) -> npt.NDArray[np.bool_]:
        """Whether each row samples a token when all it knows is computed."""
        wanted = map(self.wanted.get, rows.tolist())
        return np.array([each is None or each.generates for each in wanted], np.bool_)

    def embeds(self, rows: IntArray) -> npt.NDArray[np.bool_]:
        """Whether each row gives a vector instead."""
        wanted = map(self.wanted.get, rows.tolist())
        return np.array([each is not None and each.embeds for each in wanted], np.bool_)

    def append_tokens(self, rows: IntArray, token_ids: IntArray) -> None:
        """Append each row's sampled token to what it knows."""
        self.token_ids[rows, self.known(rows)] = token_ids
        for row in rows.tolist():
            self.num_known[row] += 1


def _edits(sampling: Sampling) -> bool:
    """Tell whether the logits are changed before a token is drawn."""
    return bool(
        sampling.repetition_penalty not in (0, 1)
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.bias_token_ids
        or sampling.allowed_token_ids
        or sampling.suppressed_token_ids
    )
