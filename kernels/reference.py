"""Every kernel in plain torch: the specification, the tests' oracle, and the CPU backend.

Owns the arithmetic. Does not know what a request, a model or a step is: shapes come with the
tensors, and all metadata is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from mili.kernels.checks import require

IntArray = npt.NDArray[np.int64]

# Rows attend together if padding at most doubles what is read for one of them; when the longest is
# at most this long, always: there, fewer calls are worth more than less reading.
_SHORT_CONTEXT = 128


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return weight * x / sqrt(mean(x^2) + epsilon) over the last dimension, computed in float32.

    x: [..., size] float32 or bfloat16; weight: [size] of x's dtype. Zhang & Sennrich 2019.
    """
    require(weight.shape == x.shape[-1:] and weight.dtype == x.dtype, "weight must fit x")
    return functional.rms_norm(x, weight.shape, weight, epsilon)


def head_norm_(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
    """RMSNorm over each head in place, every head with its own weight (Qwen3's QK-norm).

    x: [tokens, heads, head_dim]; weight: [heads, head_dim] of x's dtype.
    """
    require(weight.shape == x.shape[1:] and weight.dtype == x.dtype, "weight must fit x")
    torch.mul(functional.rms_norm(x, x.shape[-1:], None, epsilon), weight, out=x)


def gather_samples(
    x: torch.Tensor,
    attended: torch.Tensor,
    token_rows: torch.Tensor,
    sample_index: torch.Tensor,
    faulted: torch.Tensor,
    sizes: torch.Tensor,
    out_x: torch.Tensor,
    out_attended: torch.Tensor,
) -> None:
    """Look for faults in x and attended of all tokens, and copy those of the tokens that sample.

    Shapes and dtypes as in samples.py; any float. Padding, from sizes[0] on, is not looked at.
    """
    require(x.ndim == attended.ndim == 2 and len(x) == len(attended), "x must fit attended")
    tokens = slice(int(sizes[0]))
    x, attended, samples = x[tokens], attended[tokens], sample_index[tokens]
    finite = x.isfinite().all(dim=1) & attended.isfinite().all(dim=1)
    faulted[token_rows[tokens][~finite].long()] = 1
    places = samples[samples >= 0].long()
    out_x[places], out_attended[places] = x[samples >= 0], attended[samples >= 0]


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, [tokens, size], for gate_up [tokens, 2 * size] (SwiGLU)."""
    require(gate_up.ndim == 2 and gate_up.shape[1] % 2 == 0, "gate_up must be [tokens, 2 * size]")
    gate, up = gate_up.chunk(2, dim=1)
    return functional.silu(gate).mul_(up)


class RopeAngles(NamedTuple):
    """Of each token; made once a step, used in every layer."""

    cos: torch.Tensor  # [tokens, 1, 1, head_dim / 2]
    sin: torch.Tensor  # [tokens, 1, 2, head_dim / 2]: -sin for the first half, sin for the second


def rope_angles(
    positions: torch.Tensor,
    inverse_frequencies: torch.Tensor,
    dtype: torch.dtype,
    attention_factor: float = 1.0,
) -> RopeAngles:
    """positions: [tokens] int64; inverse_frequencies: [head_dim / 2] float32, scaling included.

    attention_factor: multiplies what is rotated (YaRN).
    """
    require(inverse_frequencies.dtype == torch.float32, "inverse_frequencies must be float32")
    angles = positions[:, None].float() * inverse_frequencies
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    return RopeAngles(
        cos.to(dtype)[:, None, None],
        torch.stack((-sin, sin), dim=1).to(dtype)[:, None],
    )


def rope_(x: torch.Tensor, angles: RopeAngles) -> None:
    """Rotate queries or keys in place, element i with element i + head_dim / 2.

    x: [tokens, heads, head_dim], heads contiguous. Su et al. 2021, in Hugging Face's layout.
    """
    require(x.ndim == 3 and x.shape[0] == angles.cos.shape[0], "x must be [tokens, heads, dim]")
    halves = x.view(*x.shape[:2], 2, x.shape[2] // 2)
    swapped = halves.flip(2)
    halves.mul_(angles.cos).addcmul_(swapped, angles.sin)


def write_kv(kv: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Store the keys and values of new tokens.

    kv: [tokens, 2 * kv_heads, head_dim], keys first; slots: [tokens] int64, block * block_size +
    offset; cache: one layer's [2 * kv_heads, num_blocks, block_size, head_dim].
    """
    require(kv.shape[1:] == (cache.shape[0], cache.shape[3]), "kv must fit the cache")
    cache.flatten(1, 2).index_copy_(1, slots, kv.transpose(0, 1))


class AttentionGroup(NamedTuple):
    """Neighbouring rows that attend as one batch: one with any width, or many of width 1."""

    first_token: int
    rows: int
    width: int  # new tokens of each row
    context: int  # positions of the longest row, new ones included
    blocks: torch.Tensor  # [rows * blocks of the longest row] int64
    mask: torch.Tensor | None  # [rows, 1, width, context] 0 or -inf; None: nothing but causal


def plan_attention(
    block_tables: IntArray,
    starts: IntArray,
    counts: IntArray,
    *,
    block_size: int,
    max_blocks: int,
    dtype: torch.dtype,
) -> tuple[AttentionGroup, ...]:
    """Divide a step's rows into groups for `paged_attention`, which then repeats nothing per layer.

    block_tables: [rows, >= blocks of the longest row]; starts: [rows] first new position; counts:
    [rows] new tokens; max_blocks: what a group may read at once, one row's at least. Rows of one
    new token make the largest groups when the longest come first.
    """
    contexts = starts + counts
    num_blocks = -(-contexts // block_size)
    first_tokens = np.cumsum(counts) - counts
    groups: list[AttentionGroup] = []
    row = 0
    while row < len(counts):
        end = row + _group_size(contexts[row:], counts[row:], max_blocks // int(num_blocks[row]))
        tables = block_tables[row:end, : num_blocks[row]]
        # Padding reads the row's own first block again: what is masked must be finite all the
        # same, since 0 * NaN is NaN, and a block that nobody holds may hold anything.
        padding = np.arange(tables.shape[1]) >= num_blocks[row:end, None]
        blocks = np.where(padding, tables[:, :1], tables)
        groups.append(
            AttentionGroup(
                first_token=int(first_tokens[row]),
                rows=end - row,
                width=int(counts[row]),
                context=int(contexts[row]),
                blocks=torch.from_numpy(blocks.ravel()),
                mask=_attention_mask(starts[row:end], int(counts[row]), dtype),
            )
        )
        row = end
    return tuple(groups)


def _group_size(contexts: IntArray, counts: IntArray, limit: int) -> int:
    """How many of the rows, the first included, attend together; the first is the longest."""
    if counts[0] > 1:
        return 1
    longest = contexts[0]
    shortest = longest / 2 if longest > _SHORT_CONTEXT else 0
    joins = (counts == 1) & (contexts <= longest) & (contexts >= shortest)
    return int(np.argmin(np.append(joins[: max(limit, 1)], False)))


def _attention_mask(starts: IntArray, width: int, dtype: torch.dtype) -> torch.Tensor | None:
    """None where there is nothing to hide, or nothing but what `is_causal` hides."""
    if (width == 1 or starts[0] == 0) and np.ptp(starts) == 0:
        return None
    last = starts[:, None] + np.arange(width)  # [rows, width]: the last position a token sees
    hidden = np.arange(starts[0] + width) > last[:, None, :, None]
    mask = torch.zeros(hidden.shape, dtype=dtype)
    return mask.masked_fill_(torch.from_numpy(hidden), -torch.inf)


def paged_attention(
    queries: torch.Tensor,
    cache: torch.Tensor,
    groups: Sequence[AttentionGroup],
    scratch: torch.Tensor,
) -> torch.Tensor:
    """Causal attention of new tokens over everything their rows have in the cache.

    queries: [tokens, heads, head_dim], heads a multiple of kv_heads, their keys and values written;
    cache: as for `write_kv`; scratch: flat, of the cache's dtype, for max_blocks blocks. Returns
    [tokens, heads * head_dim], zero for tokens of no group.
    """
    tokens, heads, head_dim = queries.shape
    kv_heads = cache.shape[0] // 2
    require(heads % kv_heads == 0 and cache.shape[3] == head_dim, "queries must fit the cache")
    output = queries.new_zeros(tokens, heads * head_dim)
    for group in groups:
        here = slice(group.first_token, group.first_token + group.rows * group.width)
        shape = (cache.shape[0], len(group.blocks), *cache.shape[2:])
        gathered = scratch[: math.prod(shape)].view(shape)
        torch.index_select(cache, 1, group.blocks, out=gathered)
        keys, values = (
            gathered.view(2, kv_heads, group.rows, -1, head_dim)[:, :, :, : group.context]
            .transpose(1, 2)
            .unbind()
        )  # [rows, kv_heads, context, head_dim]
        q = queries[here].view(group.rows, group.width, heads, head_dim)
        output[here].view_as(q).copy_(_attend(q, keys, values, group.mask))
    return output


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """q and the result: [rows, width, heads, head_dim]; keys, values: as above."""
    rows, width, _, head_dim = q.shape
    if width == 1 and q.dtype == torch.bfloat16:
        # The heads that share a KV head as if they were tokens: much faster in bfloat16.
        folded = q.view(rows, keys.shape[1], -1, head_dim)
        return functional.scaled_dot_product_attention(folded, keys, values, mask).view_as(q)
    return functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        keys,
        values,
        mask,
        is_causal=mask is None and width > 1,
        enable_gqa=q.shape[2] != keys.shape[1],
    ).transpose(1, 2)
