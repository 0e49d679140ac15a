"""From logits to tokens, with the sampling parameters that the table holds for each row.

Owns nothing but the way from protobuf to the kernels' columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from mili.kernels.reference_sampling import (
    SamplingRows,
    add_biases_,
    allow_only_,
    penalize_output_,
    penalize_repetition_,
    sample,
    suppress_,
)
from mili.worker.cpu.sequence_table import CpuSequenceTable, IntArray
from mili.worker.grammars import Grammars


def sample_rows(logits: torch.Tensor, table: CpuSequenceTable, rows: IntArray) -> torch.Tensor:
    """Return one token for each of `rows`, [rows] int64. logits: [rows, vocab], overwritten."""
    sampling = [table.sampling[row] for row in rows]
    positions = table.known(rows)
    edited = [index for index, row in enumerate(rows.tolist()) if row in table.edited]
    if edited:
        logits[edited] = _edit(logits[edited], table, rows[edited], positions[edited])
    if not any(s.temperature for s in sampling):
        return logits.argmax(dim=-1)
    return sample(
        logits,
        SamplingRows(
            temperature=torch.tensor([s.temperature for s in sampling]),
            top_k=torch.tensor([s.top_k for s in sampling]),
            top_p=torch.tensor([s.top_p for s in sampling]),
            min_p=torch.tensor([s.min_p for s in sampling]),
            seed=torch.from_numpy(np.array([s.seed for s in sampling], np.uint64).view(np.int64)),
            position=torch.from_numpy(positions),
        ),
    )


def hold_to_grammars(
    logits: torch.Tensor, grammars: Grammars, rows: IntArray
) -> npt.NDArray[np.bool_]:
    """Make impossible what a row's grammar does not allow, in place; returns which rows go on.

    logits: [rows, vocab]. A row does not go on, [rows], where its grammar has failed.
    """
    held = [index for index, row in enumerate(rows.tolist()) if row in grammars.rows]
    states = [grammars.rows[int(rows[index])] for index in held]
    masks = np.empty((len(held), grammars.num_words), np.int32)
    grammars.fill(masks, states)
    fits = np.ones(len(rows), np.bool_)
    fits[held] = [not state.has_failed for state in states]
    allow_only_(logits, torch.tensor(held, dtype=torch.int64), torch.from_numpy(masks))
    return fits


def _edit(
    logits: torch.Tensor, table: CpuSequenceTable, rows: IntArray, positions: IntArray
) -> torch.Tensor:
    """Apply penalties, biases and masks to logits, [rows, vocab], in place; return them.

    positions: [rows], where the tokens will stand.
    """
    sampling = [table.sampling[row] for row in rows]
    history = torch.from_numpy(table.token_ids[rows, : positions.max()])
    begins, ends = torch.from_numpy(table.num_prompt_tokens[rows]), torch.from_numpy(positions)
    penalty = torch.tensor([s.repetition_penalty for s in sampling])
    penalize_repetition_(logits, history, ends, penalty)
    presence = torch.tensor([s.presence_penalty for s in sampling])
    frequency = torch.tensor([s.frequency_penalty for s in sampling])
    penalize_output_(logits, history, begins, ends, presence, frequency)
    for index, s in enumerate(sampling):
        if s.bias_token_ids:
            token_ids, biases = torch.tensor(s.bias_token_ids), torch.tensor(s.biases)
            add_biases_(logits, torch.full_like(token_ids, index), token_ids, biases)
    masked = [index for index, row in enumerate(rows.tolist()) if row in table.allowed_mask]
    if masked:
        masks = torch.stack([table.allowed_mask[int(rows[index])] for index in masked])
        allow_only_(logits, torch.tensor(masked), masks)
    for index, s in enumerate(sampling):
        if s.suppressed_token_ids and positions[index] < s.suppress_until_position:
            token_ids = torch.tensor(s.suppressed_token_ids)
            suppress_(logits, torch.full_like(token_ids, index), token_ids)
    return logits
