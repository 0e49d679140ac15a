"""QK-norm, rotary position embedding and the write of keys and values, in one launch.

Owns the table of cosines and sines. Does not know a model's frequencies, nor which block belongs to
whom: slots come with the batch.
"""

from __future__ import annotations

import ctypes

import torch

from mili.kernels.checks import VECTOR, check, require
from mili.kernels.module import Constant, Grid, dtype_name, load

_THREADS = 256
_ELEMENTS = 16  # of a head, a thread's


def rope_table(
    inverse_frequencies: torch.Tensor, length: int, attention_factor: float
) -> torch.Tensor:
    """Return (cos, sin) * attention_factor of positions below `length`.

    inverse_frequencies: [head_dim / 2] float32, radians per position, scaling included. Returns
    [length, head_dim / 2, 2] float32 on their device. Angles are float32, as in reference.py.
    """
    require(
        inverse_frequencies.ndim == 1 and inverse_frequencies.dtype == torch.float32,
        "inverse_frequencies must be [head_dim / 2] float32",
    )
    positions = torch.arange(length, dtype=torch.float32, device=inverse_frequencies.device)
    angles = positions[:, None] * inverse_frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=-1).mul_(attention_factor)


def constants(
    dtype: torch.dtype, *, head_dim: int, num_heads: int, num_kv_heads: int, block_size: int
) -> dict[str, Constant]:
    """What "rope" is compiled with. Raises ValueError."""
    require(head_dim in (64, 128), "head_dim must be 64 or 128, not {}", head_dim)
    return {
        "SCALAR": dtype_name(dtype),
        "HEAD_DIM": head_dim,
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "BLOCK_SIZE": block_size,
    }


def qk_norm_rope_write(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cache: torch.Tensor,
    num_heads: int,
    epsilon: float,
    *,
    overlap: bool = False,
) -> None:
    """Norm and rotate queries and keys; queries stay in qkv, keys and values go to the cache.

    Each query and key head is divided by its root mean square and multiplied by q_norm or k_norm,
    where given (both or neither), then element i is rotated with element i + head_dim / 2 (Su et
    al. 2021, in Hugging Face's layout), all in float32. Keys and values in qkv stay as they were.

    qkv: [tokens, num_heads + 2 * kv_heads, head_dim] bfloat16 or float16; q_norm, k_norm:
    [head_dim]; cos_sin: of `rope_table`; positions, slots: [tokens] int32, every position below the
    table's length; cache: one layer's [num_blocks, 2 * kv_heads, block_size, head_dim]. All
    contiguous. overlap: as in norm.py. Raises ValueError.
    """
    tokens, all_heads, head_dim = qkv.shape
    num_kv_heads, block_size = cache.shape[1] // 2, cache.shape[2]
    require(
        all_heads == num_heads + 2 * num_kv_heads,
        "{} heads in qkv, but {} + 2 * {} expected",
        all_heads,
        num_heads,
        num_kv_heads,
    )
    require((q_norm is None) == (k_norm is None), "q_norm and k_norm must be given together")
    page = (2 * num_kv_heads, block_size, head_dim)
    dtype, device = qkv.dtype, qkv.device
    check("qkv", qkv, qkv.shape, dtype, device, alignment=VECTOR)
    check("cache", cache, (len(cache), *page), dtype, device, alignment=VECTOR)
    if q_norm is not None and k_norm is not None:
        check("q_norm", q_norm, (head_dim,), dtype, device, alignment=VECTOR)
        check("k_norm", k_norm, (head_dim,), dtype, device, alignment=VECTOR)
    angles = (len(cos_sin), head_dim // 2, 2)
    check("cos_sin", cos_sin, angles, torch.float32, device, alignment=VECTOR)
    check("positions", positions, (tokens,), torch.int32, device)
    check("slots", slots, (tokens,), torch.int32, device)
    module = load(
        "rope",
        **constants(
            qkv.dtype,
            head_dim=head_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            block_size=block_size,
        ),
    )
    blocks = -(-qkv.numel() // (_ELEMENTS * _THREADS))
    module["qk_norm_rope_write"].launch(
        Grid((blocks, 1, 1), _THREADS, overlap=overlap),
        qkv,
        ctypes.c_void_p() if q_norm is None else q_norm,
        ctypes.c_void_p() if k_norm is None else k_norm,
        cos_sin,
        positions,
        slots,
        cache,
        tokens,
        epsilon,
    )
