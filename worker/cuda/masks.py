"""Masks of the rows that are held to a grammar, on their way to the device.

Owns what was sampled and no grammar has heard of yet, and the host's copy of the masks. Does not
know grammars (worker/grammars.py), nor when a step samples. The forward pass of a step runs on the
device while the grammars hear of the step before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mili.worker.cuda.staging import StepRows
from mili.worker.cuda.transfer import Slot
from mili.worker.grammars import Grammars, RowGrammar


class _Sampled(NamedTuple):
    """Where the tokens of a step's held rows will be when it has ended."""

    slot: Slot
    samples: list[int]
    grammars: list[RowGrammar]


class GrammarMasks:
    """allowed_mask: [table_rows, words] int32, the device's; at most max_samples rows of a step."""

    def __init__(self, grammars: Grammars, allowed_mask: torch.Tensor, max_samples: int) -> None:
        self._grammars = grammars
        self._allowed_mask = allowed_mask
        # Read by a step's copies until it has ended, which is heard of before the next is written.
        words = allowed_mask.shape[1]
        self._masks = torch.empty(max_samples, words, dtype=torch.int32, pin_memory=True)
        self._rows = torch.empty(max_samples, dtype=torch.int64, pin_memory=True)
        self._unheard: _Sampled | None = None

    def reset(self) -> None:
        """Forget what was sampled: no step is in flight."""
        self._unheard = None

    def held(self, rows: StepRows) -> list[tuple[int, int]]:
        """Sample and table row of each row that samples in this step and is held to a grammar."""
        grammars = self._grammars.rows
        if not grammars:
            return []
        sampling = (row for row, samples in zip(rows.rows, rows.samples, strict=True) if samples)
        return [(sample, row) for sample, row in enumerate(sampling) if row in grammars]

    def hear(self) -> None:
        """Wait for the step that sampled held rows, and tell their grammars."""
        if self._unheard is None:
            return
        (slot, samples, grammars), self._unheard = self._unheard, None
        slot.ended.synchronize()
        tokens = slot.output[: samples[-1] + 1].tolist()
        for sample, grammar in zip(samples, grammars, strict=True):
            if tokens[sample] >= 0:  # no token of a row that is faulted
                grammar.take([tokens[sample]])

    @torch.inference_mode()
    def upload(self, held: list[tuple[int, int]], slot: Slot) -> frozenset[int]:
        """Copy the masks of a step's held rows, on the current stream, before it samples.

        slot: of the step. Returns the rows whose grammars have failed.
        """
        self.hear()
        rows = [row for _, row in held]
        grammars = [self._grammars.rows[row] for row in rows]
        masks, index = self._masks[: len(held)], self._rows[: len(held)]
        self._grammars.fill(masks.numpy(), grammars)
        index.copy_(torch.tensor(rows))
        device = self._allowed_mask.device
        self._allowed_mask.index_copy_(
            0, index.to(device, non_blocking=True), masks.to(device, non_blocking=True)
        )
        self._unheard = _Sampled(slot, [sample for sample, _ in held], grammars)
        return frozenset(
            row for row, grammar in zip(rows, grammars, strict=True) if grammar.has_failed
        )
