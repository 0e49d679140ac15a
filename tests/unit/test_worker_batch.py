"""A step's rows as flat arrays, against the obvious loop."""

from __future__ import annotations

import numpy as np
import torch

from mili.worker.cpu.batch import make_batch
from mili.worker.cpu.kv_cache import KVCache
from mili.worker.cpu.sequence_table import CpuSequenceTable
from mili.worker.models.config import DecoderConfig
from mili.worker.models.rope import Rope

SHAPE = DecoderConfig(
    "LlamaForCausalLM", 320, 64, 128, 1, 2, 1, 64, 1e-5, 1024, True, Rope(1e4, None)
)


def make_table() -> tuple[CpuSequenceTable, KVCache]:
    table = CpuSequenceTable(
        max_rows=9, max_model_len=256, block_size=16, num_blocks=200, vocab_size=320
    )
    generator = np.random.default_rng(0)
    table.token_ids[1:] = generator.integers(320, size=table.token_ids[1:].shape)
    table.block_table[1:] = generator.permutation(np.arange(1, 129)).reshape(8, 16)
    cache = KVCache(
        SHAPE, num_blocks=200, block_size=16, max_blocks_per_row=16, dtype=torch.float32
    )
    return table, cache


def test_tokens_positions_and_slots() -> None:
    table, cache = make_table()
    rows, starts, counts = np.array([[3, 0, 20], [1, 7, 1], [8, 200, 1], [5, 30, 33], [2, 99, 1]]).T
    batch = make_batch(table, cache, rows, starts, counts)
    # One new token first, longest first: rows 8, 2, 1; they attend in two groups.
    assert batch.rows[:3].tolist() == [8, 2, 1]
    assert batch.order[:3].tolist() == [2, 4, 1]
    assert [group.rows for group in batch.attention] == [1, 2, 1, 1]
    expected = []
    for place in batch.order:
        row, start, count = rows[place], starts[place], counts[place]
        expected += [
            (
                table.token_ids[row, position],
                position,
                table.block_table[row, position // 16] * 16 + position % 16,
            )
            for position in range(start, start + count)
        ]
    actual = torch.stack((batch.token_ids, batch.positions, batch.slots), dim=1)
    assert actual.tolist() == np.array(expected).tolist()
    assert batch.ends.tolist() == (starts + counts)[batch.order].tolist()
    assert batch.last_tokens.tolist() == (np.cumsum(counts[batch.order]) - 1).tolist()


def test_a_lone_token_is_padded_with_the_null_row() -> None:
    table, cache = make_table()
    batch = make_batch(table, cache, np.array([4]), np.array([17]), np.array([1]))
    assert batch.positions.tolist() == [17, 0]
    assert batch.slots.tolist() == [int(table.block_table[4, 1]) * 16 + 1, 0]
    assert batch.rows.tolist() == [4]
    assert batch.last_tokens.tolist() == [0]
    (group,) = batch.attention
    assert (group.rows, group.width, group.context, group.mask) == (1, 1, 18, None)
