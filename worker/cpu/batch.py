"""A step's rows as flat arrays: which tokens stand where, and what attends to what.

Owns the order in which the rows of a step are computed. Does not know the model.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from mili.kernels.reference import AttentionGroup, plan_attention
from mili.worker.cpu.kv_cache import KVCache
from mili.worker.cpu.sequence_table import CpuSequenceTable, IntArray


class Batch(NamedTuple):
    """Rows of one new token first, longest first; `order` leads back to the command's order.

    A lone token is padded to two with one of the null row, since `linear` asks for two.
    """

    order: IntArray  # [rows]: where each row stands in the command
    rows: IntArray  # [rows]
    ends: IntArray  # [rows]: computed tokens after this step
    first_tokens: IntArray  # [rows]: index of each row's first token below
    last_tokens: IntArray  # [rows]
    token_ids: torch.Tensor  # [tokens] int64
    positions: torch.Tensor  # [tokens] int64
    slots: torch.Tensor  # [tokens] int64
    attention: tuple[AttentionGroup, ...]


def make_batch(
    table: CpuSequenceTable, cache: KVCache, rows: IntArray, starts: IntArray, counts: IntArray
) -> Batch:
    """rows, starts, counts: [rows], checked by the table."""
    order = np.lexsort((-(starts + counts), counts > 1))
    rows, starts, counts = rows[order], starts[order], counts[order]
    first_tokens = np.cumsum(counts) - counts
    positions = np.arange(counts.sum()) + np.repeat(starts - first_tokens, counts)
    token_rows = np.repeat(rows, counts)
    if len(positions) == 1:
        positions, token_rows = np.append(positions, 0), np.append(token_rows, 0)
    block_size = table.block_size
    slots = table.block_table[token_rows, positions // block_size] * block_size
    longest = -(-int((starts + counts).max()) // block_size)
    return Batch(
        order=order,
        rows=rows,
        ends=starts + counts,
        first_tokens=first_tokens,
        last_tokens=first_tokens + counts - 1,
        token_ids=torch.from_numpy(table.token_ids[token_rows, positions]),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots + positions % block_size),
        attention=plan_attention(
            table.block_table[rows, :longest],
            starts,
            counts,
            block_size=block_size,
            max_blocks=cache.max_gathered_blocks,
            dtype=cache.scratch.dtype,
        ),
    )
