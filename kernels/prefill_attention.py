"""Causal attention of rows with several new tokens over their paged context.

Owns the choice between two kernels (Hopper's warpgroup instructions, or mma.sync), the tensor maps
and the counter that hands out work. Does not know how a batch is made, nor what the layer does with
the result.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from cuda.bindings import driver

from mili.kernels.checks import VECTOR, check, require
from mili.kernels.module import Argument, Constant, Grid, KernelError, dtype_name, load

TILE = 128  # queries of one work item: what `tile_offsets` counts
_HOPPER, _PORTABLE = "prefill_attention_sm90", "prefill_attention"  # the sources
_HEAD_DIMS = (64, 128)
_MAX_GROUP = 8
_PAGE = 16  # positions of one box of the copy engine
_REGION = 64  # dimensions of one box: its 128-byte swizzle allows no more
_HOPPER_THREADS, _THREADS = 384, 256
_KEYS = 64  # positions of a stage of the mma.sync kernel
_STAGES = 2
_TENSOR_TYPES = {
    torch.bfloat16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    torch.float16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
}


def source(
    dtype: torch.dtype, head_dim: int, *, use_hopper: bool | None = None
) -> tuple[str, dict[str, Constant]]:
    """What `load` and `load_all` compile. Raises ValueError.

    use_hopper: None is what the current device allows.
    """
    require(head_dim in _HEAD_DIMS, "head_dim {} is neither 64 nor 128", head_dim)
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    if use_hopper is None:
        use_hopper = is_hopper
    require(is_hopper or not use_hopper, "this device does not run the Hopper kernel")
    name = _HOPPER if use_hopper else _PORTABLE
    return name, {"SCALAR": dtype_name(dtype), "HEAD_DIM": head_dim}


class PrefillAttention:
    """Prefill attention over one cache; for one stream at a time."""

    def __init__(
        self,
        qkv_buffer: torch.Tensor,
        whole_cache: torch.Tensor,
        num_heads: int,
        *,
        use_hopper: bool | None = None,
    ) -> None:
        """Both buffers must stay where they are. Raises ValueError, KernelError.

        qkv_buffer: [max_tokens, heads + 2 * kv_heads, head_dim], of which attention reads the
        queries; whole_cache: [layers, num_blocks, 2 * kv_heads, block_size, head_dim], keys before
        values. Both contiguous, bfloat16 or float16, on the current device.
        """
        require(whole_cache.ndim == 5, "whole_cache must have 5 dimensions")
        _, _, cache_heads, block_size, head_dim = whole_cache.shape
        _check_heads(num_heads, cache_heads, block_size)
        name, constants = source(whole_cache.dtype, head_dim, use_hopper=use_hopper)
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._num_heads, self._kv_heads, self._head_dim = num_heads, cache_heads // 2, head_dim
        self._qkv, self._cache = qkv_buffer, whole_cache
        qkv_shape = (len(qkv_buffer), num_heads + cache_heads, head_dim)
        dtype, device = whole_cache.dtype, self._device
        check("qkv_buffer", qkv_buffer, qkv_shape, dtype, device, alignment=VECTOR)
        check("whole_cache", whole_cache, whole_cache.shape, dtype, device, alignment=VECTOR)
        # Work items taken and thread blocks done; zero before and after every launch.
        self.scheduler = torch.zeros(2, dtype=torch.int32, device=self._device)
        self._is_hopper = name == _HOPPER
        self._kernel = load(name, **constants)[name]
        blocks = (torch.cuda.get_device_properties(self._device).multi_processor_count, 1, 1)
        row = head_dim * whole_cache.element_size()
        # A tile of queries, stages of keys and of values; then barriers or the item, and alignment.
        if self._is_hopper:
            shared = (1 + 2 * _STAGES) * TILE * row + 2048
            self._grid = Grid(blocks, _HOPPER_THREADS, shared, overlap=True)
            self._maps = (
                _tensor_map(qkv_buffer.flatten(1), (TILE, _REGION)),
                _tensor_map(whole_cache.flatten(0, 1), (1, 1, _PAGE, _REGION)),
            )
        else:
            self._grid = Grid(blocks, _THREADS, (TILE + 2 * _STAGES * _KEYS) * row + 16)

    def attend(
        self,
        layer: int,
        block_tables: torch.Tensor,
        rows: torch.Tensor,
        starts: torch.Tensor,
        counts: torch.Tensor,
        first_tokens: torch.Tensor,
        sizes: torch.Tensor,
        tile_offsets: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Set out[first_tokens[i] + j] to the attention of query j over what it may see.

        That is positions 0 .. starts[i] + j, for batch rows i from sizes[2] to sizes[1] - 1 and
        j < counts[i]; no other token is touched. block_tables: [table_rows, max_blocks]; rows (of
        block_tables), starts, counts, first_tokens: [max_rows]; sizes: [4]; tile_offsets: [max_rows
        + 1], tiles of 128 queries before each of these rows and, at [sizes[1] - sizes[2]], of all;
        all int32. out: [tokens, heads * head_dim] of the cache's dtype. The queries are those of
        qkv_buffer; keys and values of the new tokens are in the cache. Scores and sums are float32,
        weights of the scalar type.

        One launch whatever the batch: a captured one serves any other. Raises ValueError. After
        FlashAttention-3 (Shah et al. 2024) and FlashAttention-2 (Dao 2023).
        """
        require(0 <= layer < len(self._cache), "layer {} is not in the cache", layer)
        require(block_tables.ndim == 2, "block_tables must be [table_rows, max_blocks]")
        max_rows, device = (len(rows),), self._device
        check("block_tables", block_tables, block_tables.shape, torch.int32, device)
        check("rows", rows, max_rows, torch.int32, device)
        check("starts", starts, max_rows, torch.int32, device)
        check("counts", counts, max_rows, torch.int32, device)
        check("first_tokens", first_tokens, max_rows, torch.int32, device)
        check("sizes", sizes, (4,), torch.int32, device)
        check("tile_offsets", tile_offsets, (len(rows) + 1,), torch.int32, device)
        out_shape = (len(out), self._num_heads * self._head_dim)
        check("out", out, out_shape, self._cache.dtype, device, alignment=VECTOR)
        inputs: tuple[Argument, ...]
        if self._is_hopper:
            inputs = (*self._maps, layer * self._cache.shape[1])
        else:
            inputs = (self._qkv, self._cache[layer])
        self._kernel.launch(
            self._grid,
            *inputs,
            self._cache.shape[3],
            self._num_heads,
            self._kv_heads,
            block_tables,
            block_tables.shape[1],
            rows,
            starts,
            counts,
            first_tokens,
            sizes,
            tile_offsets,
            self.scheduler,
            out,
        )


def _tensor_map(tensor: torch.Tensor, box: Sequence[int]) -> ctypes.Array[ctypes.c_uint64]:
    """How the copy engine reads boxes of a contiguous tensor, as the kernel's parameter.

    box: a size for each dimension. What lies outside the tensor reads as zeros.
    """
    # The driver counts dimensions from the innermost, and strides in bytes without its own.
    sizes = [driver.cuuint64_t(size) for size in reversed(tensor.shape)]
    strides = [
        driver.cuuint64_t(math.prod(tensor.shape[-inner:]) * tensor.element_size())
        for inner in range(1, tensor.ndim)
    ]
    status, encoded = driver.cuTensorMapEncodeTiled(
        _TENSOR_TYPES[tensor.dtype],
        tensor.ndim,
        tensor.data_ptr(),
        sizes,
        strides,
        [driver.cuuint32_t(size) for size in reversed(box)],
        [driver.cuuint32_t(1)] * tensor.ndim,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise KernelError(f"tensor map of {list(tensor.shape)}: {status.name}")
    return (ctypes.c_uint64 * 16)(*(int(word) for word in encoded.opaque))


def _check_heads(num_heads: int, cache_heads: int, block_size: int) -> None:
    kv_heads = cache_heads // 2
    require(
        cache_heads > 0 and cache_heads % 2 == 0,
        "whole_cache must hold keys and values, not {} heads",
        cache_heads,
    )
    require(
        num_heads % kv_heads == 0 and 1 <= num_heads // kv_heads <= _MAX_GROUP,
        "{} heads must be 1 to {} times the {} KV heads",
        num_heads,
        _MAX_GROUP,
        kv_heads,
    )
    require(
        block_size > 0 and block_size % _PAGE == 0,
        "block_size {} is no multiple of {}",
        block_size,
        _PAGE,
    )
