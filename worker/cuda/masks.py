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
    """Where the token of a held row will be when the step has ended."""

    slot: Slot
    sample: int
    grammar: RowGrammar


class GrammarMasks:
    """allowed_mask: [table_rows, words] int32, the device's; at most max_samples rows of a step."""

    def __init__(self, grammars: Grammars, allowed_mask: torch.Tensor, max_samples: int) -> None:
        self._grammars = grammars
        self._allowed_mask = allowed_mask
        # Read by a step's copies until it has ended, which is heard of before the next is written.
        self._host = torch.empty(
            max_samples, allowed_mask.shape[1], dtype=torch.int32, pin_memory=True
        )
        self._unheard: list[_Sampled] = []

    def reset(self) -> None:
        """Forget what was sampled: no step is in flight."""
        self._unheard.clear()

    def held(self, rows: StepRows) -> list[tuple[int, int]]:
        """Sample and table row of each row that samples in this step and is held to a grammar."""
        grammars = self._grammars.rows
        if not grammars:
            return []
        sampling = (row for row, samples in zip(rows.rows, rows.samples, strict=True) if samples)
        return [(sample, row) for sample, row in enumerate(sampling) if row in grammars]

    def hear(self) -> None:
        """Wait for the steps that sampled held rows, and tell their grammars."""
        for slot, sample, grammar in self._unheard:
            slot.ended.synchronize()
            token = slot.output[sample]
            if token >= 0:  # no token of a row that is faulted
                grammar.take([token])
        self._unheard.clear()

    @torch.inference_mode()
    def upload(self, held: list[tuple[int, int]], slot: Slot) -> frozenset[int]:
        """Copy the masks of a step's held rows, on the current stream, before it samples.

        slot: of the step. Returns the rows whose grammars have failed.
        """
        self.hear()
        failed: set[int] = set()
        for place, (sample, row) in enumerate(held):
            grammar = self._grammars.rows[row]
            grammar.fill(self._host[place].numpy())
            self._allowed_mask[row].copy_(self._host[place], non_blocking=True)
            if grammar.has_failed:
                failed.add(row)
            self._unheard.append(_Sampled(slot, sample, grammar))
        return frozenset(failed)
