"""SwiGLU's elementwise part.

Owns nothing but the shapes. Does not know which projections stand around it.
"""

from __future__ import annotations

import torch

from mili.kernels.checks import VECTOR, check, require
from mili.kernels.module import Constant, Grid, dtype_name, load

_THREADS = 256
_ELEMENTS = 16  # of the output, a thread's


def constants(dtype: torch.dtype, size: int) -> dict[str, Constant]:
    """What "activation" is compiled with for outputs of `size` elements. Raises ValueError."""
    require(
        size > 0 and size % 8 == 0,
        "a token's output must be a multiple of 8 elements, not {}",
        size,
    )
    return {"SCALAR": dtype_name(dtype), "SIZE": size}


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor, *, overlap: bool = False) -> None:
    """out = silu(gate) * up, computed in float32. Shazeer 2020.

    gate_up: [tokens, 2 * size] bfloat16 or float16, gates first; out: [tokens, size], alike; both
    contiguous. overlap: as in norm.py. Raises ValueError.
    """
    tokens, size = out.shape
    check("out", out, out.shape, out.dtype, out.device, alignment=VECTOR)
    check("gate_up", gate_up, (tokens, 2 * size), out.dtype, out.device, alignment=VECTOR)
    blocks = -(-tokens * size // (_ELEMENTS * _THREADS))
    load("activation", **constants(out.dtype, size))["silu_and_mul"].launch(
        Grid((blocks, 1, 1), _THREADS, overlap=overlap), gate_up, out, tokens
    )
