"""From logits to tokens, with the sampling parameters that the table holds for each row.

Owns nothing but the way from protobuf to the kernels' columns.
"""

from __future__ import annotations

import numpy as np
import torch

from mili.kernels.reference_sampling import SamplingRows, penalize_repetition_, sample, suppress_
from mili.worker.cpu.sequence_table import CpuSequenceTable, IntArray


def sample_rows(logits: torch.Tensor, table: CpuSequenceTable, rows: IntArray) -> torch.Tensor:
    """Return one token for each of `rows`, [rows] int64. logits: [rows, vocab], overwritten."""
    sampling = [table.sampling[row] for row in rows]
    positions = table.known(rows)
    penalty = torch.tensor([s.repetition_penalty for s in sampling])
    if any(s.repetition_penalty not in (0, 1) for s in sampling):
        history = torch.from_numpy(table.token_ids[rows, : positions.max()])
        penalize_repetition_(logits, history, torch.from_numpy(positions), penalty)
    suppressed = [
        (index, token_id)
        for index, (s, position) in enumerate(zip(sampling, positions, strict=True))
        if position < s.suppress_until_position
        for token_id in s.suppressed_token_ids
    ]
    if suppressed:
        suppress_(logits, *torch.tensor(suppressed).unbind(dim=1))
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
