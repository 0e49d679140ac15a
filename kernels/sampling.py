"""Sampling on the GPU: logits, the sequence table's parameters and positions in, tokens out.

Owns the launches and their scratch. Does not know who fills the table; the arithmetic is
kernels/reference_sampling.py's.
"""

from __future__ import annotations

import ctypes
from enum import IntFlag
from typing import NamedTuple

import torch

from mili.kernels.checks import check, require
from mili.kernels.module import Grid, load
from mili.kernels.reference_sampling import MAX_BIASES

_THRESHOLD_THREADS = 512
_LIST = 16384  # logits that shared memory holds while a threshold is searched
_DRAW_THREADS = 256
_DRAW_BLOCKS = 5  # of a multiprocessor
_TILE = 4 * _DRAW_THREADS  # logits that a block draws from at a time
_MAX_ROUNDS = 16  # tiles of a block; with more, the last blocks would leave the card idle for long
_PART_BYTES = 24


class Edit(IntFlag):
    """What changes a row's logits before a token is drawn; SUPPRESSED ends at a position."""

    REPETITION = 1
    OUTPUT = 2
    BIASES = 4
    ALLOWED = 8
    SUPPRESSED = 16


class SamplingTable(NamedTuple):
    """What each row of the sequence table is sampled with; a value of 0 turns its step off.

    The columns of an edit are read only where its bit is set in `edits`. A mask is [table_rows,
    words] int32: token t is bit t % 32 of word t // 32.
    """

    temperature: torch.Tensor  # [table_rows] float32; 0 is greedy
    top_k: torch.Tensor  # [table_rows] int32
    top_p: torch.Tensor  # [table_rows] float32; also off at 1
    min_p: torch.Tensor  # [table_rows] float32
    seed: torch.Tensor  # [table_rows] int64, the bits of an unsigned number
    edits: torch.Tensor  # [table_rows] int32: bits of Edit
    repetition_penalty: torch.Tensor  # [table_rows] float32
    presence_penalty: torch.Tensor  # [table_rows] float32
    frequency_penalty: torch.Tensor  # [table_rows] float32
    suppress_until: torch.Tensor  # [table_rows] int32: the first position that may be any token
    num_biases: torch.Tensor  # [table_rows] int32
    suppressed: torch.Tensor  # mask
    seen: torch.Tensor  # mask: known tokens
    allowed_mask: torch.Tensor  # mask
    biased: torch.Tensor  # mask: tokens that have a bias
    bias_token_ids: torch.Tensor  # [table_rows, MAX_BIASES] int32, rising
    biases: torch.Tensor  # [table_rows, MAX_BIASES] float32
    output_counts: torch.Tensor  # [table_rows, 32 words] int16, the bits of an unsigned number

    def struct(self) -> ctypes.Array[ctypes.c_void_p]:
        """The columns' addresses, as kernels take them."""
        return (ctypes.c_void_p * len(self))(*(column.data_ptr() for column in self))

    @property
    def num_bytes(self) -> int:
        return sum(column.nbytes for column in self)


def allocate_sampling(table_rows: int, vocab_size: int, device: torch.device) -> SamplingTable:
    """A table of zeros."""
    words = -(-vocab_size // 32)
    return SamplingTable(
        *(
            torch.zeros(_shape(name, table_rows, words), dtype=_dtype(name), device=device)
            for name in SamplingTable._fields
        )
    )


def _shape(column: str, table_rows: int, words: int) -> tuple[int, ...]:
    if column in ("suppressed", "seen", "allowed_mask", "biased"):
        return table_rows, words
    if column in ("bias_token_ids", "biases"):
        return table_rows, MAX_BIASES
    return (table_rows, 32 * words) if column == "output_counts" else (table_rows,)


def _dtype(column: str) -> torch.dtype:
    return {
        "temperature": torch.float32,
        "top_p": torch.float32,
        "min_p": torch.float32,
        "seed": torch.int64,
        "repetition_penalty": torch.float32,
        "presence_penalty": torch.float32,
        "frequency_penalty": torch.float32,
        "biases": torch.float32,
        "output_counts": torch.int16,
    }.get(column, torch.int32)


class Sampler:
    """The kernels and their scratch, for at most `max_samples` rows at once on one stream."""

    def __init__(self, vocab_size: int, max_samples: int) -> None:
        module = load("sampling", SCALAR="__nv_bfloat16")  # for common.cuh: nothing here is of it
        self._find_thresholds = module["sampling_threshold"]
        self._draw = module["sampling_draw"]
        self._vocab_size = vocab_size
        self._max_samples = max_samples
        self._tiles = -(-vocab_size // _TILE)  # of a row
        self._thresholds = torch.empty(max_samples, dtype=torch.float32, device="cuda")
        self._parts = torch.empty(
            max_samples * self._tiles * _PART_BYTES, dtype=torch.uint8, device="cuda"
        )
        self._arrivals = torch.zeros(max_samples, dtype=torch.int32, device="cuda")
        self._resident_blocks = _DRAW_BLOCKS * (
            torch.cuda.get_device_properties(self._parts.device).multi_processor_count
        )

    def sample(
        self,
        logits: torch.Tensor,
        table: SamplingTable,
        sample_rows: torch.Tensor,
        sample_positions: torch.Tensor,
        sizes: torch.Tensor,
        token_ids: torch.Tensor,
        faulted: torch.Tensor,
        out_tokens: torch.Tensor,
        out_logprobs: torch.Tensor,
    ) -> None:
        """Draw one token for each sample: the same as the reference whatever else is in the batch.

        logits: [samples, vocab_size] float32, of which the first sizes[3] count; sample_rows,
        sample_positions: [>= samples] int32, table row and where the token will stand; sizes: [4]
        int32; token_ids: [table_rows, > positions] int32; faulted: [table_rows] int32; out_tokens:
        [>= samples] int32; out_logprobs: [>= samples] float32.

        Sample s of row r at position p gives out_tokens[s] = token_ids[r, p] = token, its logarithm
        of probability before any parameter is applied in out_logprobs[s], and, where the row has
        penalties, is in table.seen and table.output_counts from then on. A row that is faulted, or
        whose logits are NaN, +infinity or all -infinity, gives out_tokens[s] = -1 and faulted[r] =
        1 and nothing else.

        Gumbel-max: no sort and no normalisation. top-k and top-p by radix selection of the lowest
        logit that is kept; those equal to it are kept, too. Raises ValueError.
        """
        samples = len(logits)
        self._check_sizes(logits, sample_rows, sample_positions, sizes, out_tokens, out_logprobs)
        self._check_table(table, token_ids, faulted)
        columns = table.struct()
        self._find_thresholds.launch(
            Grid((samples, 1, 1), _THRESHOLD_THREADS, shared=4 * _LIST, overlap=True),
            logits,
            self._vocab_size,
            columns,
            sample_rows,
            sample_positions,
            sizes,
            _LIST,
            self._thresholds,
        )
        # How a row is divided changes no token, and no log-probability by more than rounding.
        rounds = -(-self._tiles * samples // self._resident_blocks)
        rounds = min(rounds, _MAX_ROUNDS)
        self._draw.launch(
            Grid((-(-self._tiles // rounds), samples, 1), _DRAW_THREADS, overlap=True),
            logits,
            self._vocab_size,
            columns,
            sample_rows,
            sample_positions,
            sizes,
            self._thresholds,
            rounds,
            self._parts,
            self._arrivals,
            token_ids,
            token_ids.shape[1],
            faulted,
            out_tokens,
            out_logprobs,
        )

    def _check_sizes(
        self,
        logits: torch.Tensor,
        sample_rows: torch.Tensor,
        sample_positions: torch.Tensor,
        sizes: torch.Tensor,
        out_tokens: torch.Tensor,
        out_logprobs: torch.Tensor,
    ) -> None:
        samples = len(logits)
        require(
            0 < samples <= self._max_samples,
            "logits must have 1 to {} rows, not {}",
            self._max_samples,
            samples,
        )
        device = self._parts.device
        check("logits", logits, (samples, self._vocab_size), torch.float32, device)
        check("sizes", sizes, (4,), torch.int32, device)
        for name, tensor, dtype in (
            ("sample_rows", sample_rows, torch.int32),
            ("sample_positions", sample_positions, torch.int32),
            ("out_tokens", out_tokens, torch.int32),
            ("out_logprobs", out_logprobs, torch.float32),
        ):
            check(name, tensor[:samples], (samples,), dtype, device)

    def _check_table(
        self, table: SamplingTable, token_ids: torch.Tensor, faulted: torch.Tensor
    ) -> None:
        rows, words = len(token_ids), -(-self._vocab_size // 32)
        device = self._parts.device
        check("token_ids", token_ids, (rows, token_ids.shape[-1]), torch.int32, device)
        check("faulted", faulted, (rows,), torch.int32, device)
        for name, column in table._asdict().items():
            check(name, column, _shape(name, rows, words), _dtype(name), device)
