"""The keys and values of every block, and how many blocks there is room for.

Owns the memory. Does not know which block belongs to whom: the router decides that.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import psutil
import torch

from mili.worker.config import WorkerConfig
from mili.worker.models.config import DecoderConfig

_CGROUP = Path("/sys/fs/cgroup")
# What attention may copy together at once: enough rows to be quick, little enough to stay in cache.
_SCRATCH_BYTES = 32 << 20


class KVCache:
    """layers[i] is layer i's [2 * kv_heads, num_blocks, block_size, head_dim], keys first.

    What was written is finite: a row whose keys or values may not be is cleared at once. Memory is
    taken from the machine when it is first touched. scratch: flat, see `paged_attention`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        num_blocks: int,
        block_size: int,
        max_blocks_per_row: int,
        dtype: torch.dtype,
    ) -> None:
        layer = (2 * config.num_kv_heads, num_blocks, block_size, config.head_dim)
        block_items = layer[0] * block_size * config.head_dim
        self.max_gathered_blocks = max(
            min(max_blocks_per_row, num_blocks), _SCRATCH_BYTES // (block_items * dtype.itemsize)
        )
        items = config.num_layers * num_blocks * block_items
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layers = list(_untouched(items, dtype).view(config.num_layers, *layer))
        self.scratch = _untouched(self.max_gathered_blocks * block_items, dtype)

    def clear(self, slots: torch.Tensor) -> None:
        """Set what was written at `slots`, [n] int64, to zero."""
        for layer in self.layers:
            layer.flatten(1, 2).index_fill_(1, slots, 0)


def count_blocks(config: WorkerConfig, decoder: DecoderConfig, item_size: int, limit: int) -> int:
    """Return the number of blocks, the null block included.

    item_size: bytes of one number; limit: the context limit in tokens. Raises ValueError.
    """
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    block_bytes = (
        2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim
        * config.block_size * item_size
    )  # fmt: skip
    if config.kv_cache_memory_bytes is not None:
        num_blocks = config.kv_cache_memory_bytes // block_bytes
    else:
        useful = 1 + config.max_num_seqs * -(-limit // config.block_size)
        num_blocks = min(
            int(available_memory() * config.kv_cache_memory_fraction) // block_bytes, useful
        )
    if num_blocks < 2:
        raise ValueError(
            f"the KV cache has room for {num_blocks} blocks of {block_bytes} bytes and needs 2 at "
            "least: raise MILI_KV_CACHE_MEMORY_BYTES, free memory, or lower --block-size"
        )
    return num_blocks


def available_memory() -> int:
    """Return the bytes that this process may still take: the machine's, or its container's."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except OSError:
        return available
    return available if limit == "max" else min(available, max(int(limit) - used, 0))


def _untouched(items: int, dtype: torch.dtype) -> torch.Tensor:
    """Return [items] zeros that take no memory until they are touched."""
    size = items * dtype.itemsize
    try:
        memory = mmap.mmap(-1, size)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"the KV cache cannot have {size} bytes ({error}): lower --num-gpu-blocks-override or "
            "MILI_KV_CACHE_MEMORY_BYTES"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)
