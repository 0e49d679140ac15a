"""Attention of rows with one new token over their paged context, balanced whatever their lengths.

Owns the scratch of the launch. Does not know how a batch is made, nor what the layer does with the
result.
"""

from __future__ import annotations

import torch

from mili.kernels.checks import VECTOR, check, require
from mili.kernels.module import Constant, Grid, dtype_name, load

NAME = "decode_attention"  # of the source
_THREADS = 128
# What the registers of a page of keys, one of values and the result allow.
_BLOCKS_PER_SM = {64: 4, 128: 3}
_MAX_GROUP = 8


def constants(
    *,
    num_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    block_size: int,
    max_rows: int,
) -> dict[str, Constant]:
    """What `load` and `load_all` compile the source with. Raises ValueError."""
    require(
        kv_heads > 0 and num_heads % kv_heads == 0 and 1 <= num_heads // kv_heads <= _MAX_GROUP,
        "{} heads must be 1 to {} times the {} KV heads",
        num_heads,
        _MAX_GROUP,
        kv_heads,
    )
    require(head_dim in _BLOCKS_PER_SM, "head_dim {} is neither 64 nor 128", head_dim)
    require(
        block_size > 0 and block_size % 16 == 0, "block_size {} is no multiple of 16", block_size
    )
    require(0 < max_rows <= 1024, "max_rows {} is not in 1 .. 1024", max_rows)
    return {
        "SCALAR": dtype_name(dtype),
        "HEADS": num_heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "MAX_ROWS": max_rows,
        "BLOCKS_PER_SM": _BLOCKS_PER_SM[head_dim],
    }


class DecodeAttention:
    """Decode attention of one shape of heads on the current device; for one stream at a time."""

    def __init__(
        self,
        num_heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        block_size: int,
        max_rows: int,
    ) -> None:
        """max_rows: the capacity of a batch, at most 1024. Raises ValueError."""
        defined = constants(
            num_heads=num_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            block_size=block_size,
            max_rows=max_rows,
        )
        self._kernel = load(NAME, **defined)[NAME]
        processors = torch.cuda.get_device_properties().multi_processor_count
        blocks = processors * _BLOCKS_PER_SM[head_dim]
        self._grid = Grid((blocks, 1, 1), _THREADS, overlap=True)
        self._num_heads, self._kv_heads, self._head_dim = num_heads, kv_heads, head_dim
        self._dtype, self._block_size, self._max_rows = dtype, block_size, max_rows
        self._device = torch.device("cuda", torch.cuda.current_device())
        # Of the first and the last segment of each thread block: values, their max, their sum.
        self.partials = torch.empty(
            (2 * blocks, num_heads // kv_heads, head_dim + 4),
            dtype=torch.float32,
            device=self._device,
        )
        # Thread blocks that have arrived; zero before and after every launch.
        self.counters = torch.zeros((max_rows, kv_heads), dtype=torch.int32, device=self._device)

    def attend(
        self,
        qkv: torch.Tensor,
        cache: torch.Tensor,
        block_tables: torch.Tensor,
        rows: torch.Tensor,
        starts: torch.Tensor,
        sizes: torch.Tensor,
        page_offsets: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Set out[i] to the attention of token i over positions 0 .. starts[i], for i < sizes[2].

        qkv: [tokens, heads + 2 * kv_heads, head_dim], of which the queries are read; cache: one
        layer's [num_blocks, 2 * kv_heads, block_size, head_dim], the new tokens included;
        block_tables: [table_rows, max_blocks]; rows, starts: [max_rows]; sizes: [4]; page_offsets:
        [max_rows + 1], pages of 16 positions before each row; out: [tokens, heads * head_dim].
        qkv, cache and out are of the scalar type, all else int32. Scores and sums are float32,
        probabilities of the scalar type. The result does not depend on the order of execution.

        On Hopper the kernel begins while the one ahead of it still runs. Only the queries and
        position starts[i] of each row may be written by that one; it must be launched without
        overlap, or wait for its own predecessor before it releases its successor.

        Raises ValueError. Online softmax after Milakov & Gimelshein 2018; split over positions like
        Flash-Decoding (Dao et al. 2023); equal shares of work like Stream-K (Osama et al. 2023).
        """
        tokens, heads, size = len(qkv), self._num_heads, self._head_dim
        page = (2 * self._kv_heads, self._block_size, size)
        require(cache.ndim == 4, "cache must be [num_blocks, 2 * kv_heads, block_size, head_dim]")
        require(block_tables.ndim == 2, "block_tables must be [table_rows, max_blocks]")
        qkv_shape = (tokens, heads + 2 * self._kv_heads, size)
        dtype, device = self._dtype, self._device
        check("qkv", qkv, qkv_shape, dtype, device, alignment=VECTOR)
        check("cache", cache, (len(cache), *page), dtype, device, alignment=VECTOR)
        check("out", out, (tokens, heads * size), dtype, device, alignment=VECTOR)
        check("block_tables", block_tables, block_tables.shape, torch.int32, device)
        check("rows", rows, (self._max_rows,), torch.int32, device)
        check("starts", starts, (self._max_rows,), torch.int32, device)
        check("sizes", sizes, (4,), torch.int32, device)
        check("page_offsets", page_offsets, (self._max_rows + 1,), torch.int32, device)
        self._kernel.launch(
            self._grid,
            qkv,
            cache,
            block_tables,
            rows,
            starts,
            sizes,
            page_offsets,
            out,
            self.partials,
            self.counters,
            block_tables.shape[1],
        )
