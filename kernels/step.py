"""A step's bookkeeping on the device: what the router changed, and the batch as flat arrays.

Owns the layout of the input that a step copies to the device, and of the batch that its kernels
read. Does not know what the model computes.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch

from mili.kernels.checks import require
from mili.kernels.module import Grid, Launch, load
from mili.kernels.sampling import SamplingTable, allocate_sampling

# Rows of one step at most, and tokens that one thread block spreads.
MAX_ROWS = 1024
# Columns of the input, in int32: sizes (num_tokens, num_rows, num_decode_rows, num_admissions,
# num_appended, unused), then rows, starts, counts and whether each row samples, MAX_ROWS each; then
# the deltas: admissions, appended blocks (row, index, block), and where the admissions point to,
# counted from the first of them.
NUM_SIZES = 8
SIZES, ROWS, STARTS, COUNTS, SAMPLES, DELTAS = 0, *(NUM_SIZES + MAX_ROWS * i for i in range(5))
# An admission: row, num_tokens, num_prompt_tokens, tokens_at; temperature; top_k; top_p, min_p;
# seed; edits; repetition, presence and frequency penalty; suppress_until, num_suppressed,
# num_allowed, num_biases; nothing. Behind the tokens stand the suppressed ones, the allowed ones,
# those that have a bias, and the biases.
ADMISSION = struct.Struct("<4ifi2fQi3f4i8x")
ADMISSION_SIZE = 20
# What the host gets: the sampled tokens, then whether each row of the batch is faulted.
OUTPUTS = 2 * MAX_ROWS
_THREADS = 256
_BEGIN_BLOCKS = 32


class SequenceTensors(NamedTuple):
    """What each row of the sequence table holds, [table_rows, ...]; row 0 is the null row."""

    token_ids: torch.Tensor  # [table_rows, max_model_len + 1] int32
    block_tables: torch.Tensor  # [table_rows, max_blocks] int32
    faulted: torch.Tensor  # [table_rows] int32
    sampling: SamplingTable


class BatchTensors(NamedTuple):
    """A step's batch, int32. Rows of one new token come first: those decode, the others prefill."""

    sizes: torch.Tensor  # [4]: num_tokens, num_rows, num_decode_rows, num_samples
    rows: torch.Tensor  # [MAX_ROWS]: table row
    starts: torch.Tensor  # [MAX_ROWS]: first new position
    counts: torch.Tensor  # [MAX_ROWS]: new tokens
    first_tokens: torch.Tensor  # [MAX_ROWS]: index of the row's first token
    page_offsets: torch.Tensor  # [MAX_ROWS + 1]: pages of 16 positions before each decode row
    tile_offsets: torch.Tensor  # [MAX_ROWS + 1]: tiles of 128 queries before each prefill row
    sample_rows: torch.Tensor  # [MAX_ROWS]: table row of each sample
    sample_positions: torch.Tensor  # [MAX_ROWS]: where the sampled token will stand
    token_ids: torch.Tensor  # [max_tokens]
    positions: torch.Tensor  # [max_tokens]
    slots: torch.Tensor  # [max_tokens]
    token_rows: torch.Tensor  # [max_tokens]: table row
    sample_index: torch.Tensor  # [max_tokens]: the sample that the token gives, or -1


def allocate_sequences(
    *, table_rows: int, max_model_len: int, max_blocks: int, vocab_size: int, device: torch.device
) -> SequenceTensors:
    def column(dtype: torch.dtype, *more: int) -> torch.Tensor:
        return torch.zeros(table_rows, *more, dtype=dtype, device=device)

    return SequenceTensors(
        token_ids=column(torch.int32, max_model_len + 1),
        block_tables=column(torch.int32, max_blocks),
        faulted=column(torch.int32),
        sampling=allocate_sampling(table_rows, vocab_size, device),
    )


def allocate_batch(max_tokens: int, device: torch.device) -> BatchTensors:
    sizes = {"sizes": 4, "page_offsets": MAX_ROWS + 1, "tile_offsets": MAX_ROWS + 1}
    of_tokens = ("token_ids", "positions", "slots", "token_rows", "sample_index")
    sizes |= dict.fromkeys(of_tokens, max_tokens)
    return BatchTensors(
        *(
            torch.zeros(sizes.get(name, MAX_ROWS), dtype=torch.int32, device=device)
            for name in BatchTensors._fields
        )
    )


def begin_step(
    host_input: torch.Tensor,
    step_input: torch.Tensor,
    table: SequenceTensors,
    *,
    deltas: torch.Tensor | None = None,
) -> Launch:
    """Copy the columns to step_input, overwrite the admitted rows, append blocks to their tables.

    host_input: pinned int32, read when the launch runs; step_input: [DELTAS] int32 on the device.
    deltas: where they are if not in host_input behind the columns.
    """
    return load("step")["begin_step"].bind(
        Grid((_BEGIN_BLOCKS, 1, 1), _THREADS),
        host_input,
        host_input[DELTAS:] if deltas is None else deltas,
        step_input,
        table.block_tables,
        table.block_tables.shape[1],
        table.token_ids,
        table.token_ids.shape[1],
        table.faulted,
        table.sampling.struct(),
        table.sampling.seen.shape[1],
    )


def make_batch(
    step_input: torch.Tensor,
    table: SequenceTensors,
    batch: BatchTensors,
    *,
    num_padded: int,
    block_size: int,
) -> None:
    """Spread the rows that the input names over `num_padded` tokens; the rest is padding.

    Padding stands at position 0 of the null row and is written to slot 0.
    """
    require(
        0 < num_padded <= len(batch.token_ids),
        "{} tokens do not fit a batch of {}",
        num_padded,
        len(batch.token_ids),
    )
    load("step")["make_batch"].launch(
        Grid((-(-num_padded // MAX_ROWS), 1, 1), MAX_ROWS),
        step_input,
        table.block_tables,
        table.block_tables.shape[1],
        block_size,
        table.token_ids,
        table.token_ids.shape[1],
        num_padded,
        *batch,
    )


def end_step(
    batch: BatchTensors, faulted: torch.Tensor, sampled: torch.Tensor, host_output: torch.Tensor
) -> Launch:
    """Hand out the sampled tokens, and faulted[row] of each row of the batch.

    sampled: [MAX_ROWS] int32; host_output: [OUTPUTS] int32, pinned.
    """
    return load("step")["end_step"].bind(
        Grid((MAX_ROWS // _THREADS, 1, 1), _THREADS),
        batch.sizes,
        batch.rows,
        faulted,
        sampled,
        host_output,
    )
