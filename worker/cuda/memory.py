"""Whether a GPU will do, and how much of its memory the KV cache may take.

Owns the sum. Does not know which block belongs to whom.
"""

from __future__ import annotations

import structlog
import torch

from mili.worker.config import WorkerConfig
from mili.worker.models.config import DecoderConfig

log = structlog.get_logger()

# For what is allocated after the KV cache: graphs, attention's partial results, the libraries' own
# code and workspaces.
RESERVE_BYTES = 1 << 30
_GIB = 1 << 30


# bfloat16 products and asynchronous copies came with Ampere.
_LEAST_CAPABILITY = (8, 0)


def check_device(device: torch.device) -> None:
    """Raises ValueError where there is no GPU, or one that the kernels do not run on."""
    if not torch.cuda.is_available():
        raise ValueError(
            "--device cuda finds no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES, and whether "
            f"this PyTorch ({torch.__version__}) is built for CUDA"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}: the kernels need 8.0 or later"
        )


def count_blocks(
    config: WorkerConfig, decoder: DecoderConfig, item_size: int, device: torch.device
) -> int:
    """Blocks for what is free now, the weights being in place; the null block included.

    Raises ValueError, which says what to change.
    """
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    block_bytes = (
        2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim
        * config.block_size * item_size
    )  # fmt: skip
    free, total = torch.cuda.mem_get_info(device)
    if config.kv_cache_memory_bytes is not None:
        room, setting = config.kv_cache_memory_bytes, "MILI_KV_CACHE_MEMORY_BYTES"
    else:
        room = free - int((1 - config.gpu_memory_utilization) * total) - RESERVE_BYTES
        setting = f"--gpu-memory-utilization {config.gpu_memory_utilization:g}"
    num_blocks = room // block_bytes
    if num_blocks < 2 or room > free:
        raise ValueError(
            f"no room for the KV cache: {free / _GIB:.1f} GiB of {total / _GIB:.1f} GiB are free "
            f"after loading the weights, and {setting} gives it {max(room, 0) / _GIB:.1f} GiB: "
            f"{'lower' if room > free else 'raise'} that, lower --max-num-batched-tokens, or end "
            "other processes on the GPU"
        )
    return int(num_blocks)


def log_capacity(num_blocks: int, block_size: int, sampling_bytes: int) -> None:
    """sampling_bytes: of what the sequence table holds for sampling; most are counts of tokens."""
    tokens = (num_blocks - 1) * block_size
    log.info(
        "KV cache",
        tokens=tokens,
        sequences_of_4096_tokens=round(tokens / 4096, 1),
        blocks=num_blocks,
        sampling_state_mib=round(sampling_bytes / (1 << 20), 1),
    )


def out_of_memory(error: torch.OutOfMemoryError, device: torch.device) -> ValueError:
    """What to tell the operator when the weights or buffers do not fit."""
    free, total = torch.cuda.mem_get_info(device)
    return ValueError(
        f"out of memory on {torch.cuda.get_device_name(device)} ({total / _GIB:.1f} GiB, "
        f"{free / _GIB:.1f} GiB free) while loading: {str(error).splitlines()[0]}: choose a "
        "smaller model or a larger GPU, lower --max-num-batched-tokens or --max-num-seqs, or end "
        "other processes on the GPU"
    )
