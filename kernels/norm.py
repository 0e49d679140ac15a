"""RMSNorm, alone and fused with what stands before it.

Owns the shapes and how a token is divided over a thread block. Does not know which norm of a model
it computes.

With overlap=True a kernel may begin before the one before it on the stream has ended (programmatic
dependent launch); all of them wait before they touch anything but weights.
"""

from __future__ import annotations

import ctypes

import torch

from mili.kernels.checks import VECTOR, check, require
from mili.kernels.module import Constant, Grid, Kernel, dtype_name, load

_MAX_THREADS = 1024


def constants(dtype: torch.dtype, size: int) -> dict[str, Constant]:
    """What "norm" is compiled with for tokens of `size` elements. Raises ValueError."""
    require(size > 0 and size % 8 == 0, "a token must have a multiple of 8 elements, not {}", size)
    # Sixteen elements a thread: two loads in flight each.
    threads = min(-(-size // (16 * 32)) * 32, _MAX_THREADS)
    return {"SCALAR": dtype_name(dtype), "SIZE": size, "THREADS": threads}


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    epsilon: float,
    *,
    overlap: bool = False,
) -> None:
    """out = weight * x / sqrt(mean(x^2) + epsilon), computed in float32. Zhang & Sennrich 2019.

    x, out: [tokens, size] bfloat16 or float16; weight: [size]. All of one dtype and contiguous,
    here and below. Raises ValueError.
    """
    _check(x, weight=(weight, x.shape[1:]), out=(out, x.shape))
    kernel, grid = _kernel("rms_norm", x, overlap)
    kernel.launch(grid, x, weight, out, epsilon)


def add_rms_norm_(
    x: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    epsilon: float,
    *,
    overlap: bool = False,
) -> None:
    """x += delta, rounded as x stores it; out = rms_norm(x).

    x, delta, out: [tokens, size]; weight: [size]. Raises ValueError.
    """
    _check(x, delta=(delta, x.shape), weight=(weight, x.shape[1:]), out=(out, x.shape))
    kernel, grid = _kernel("add_rms_norm", x, overlap)
    kernel.launch(grid, x, delta, weight, out, epsilon)


def embed_rms_norm(
    token_ids: torch.Tensor,
    embedding: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    epsilon: float,
) -> None:
    """x = embedding[token_ids]; out = rms_norm(x). A step's first kernel: it never overlaps.

    token_ids: [tokens] int32, each in the vocabulary; embedding: [vocab, size]; weight: [size];
    x, out: [tokens, size]. Raises ValueError.
    """
    _check(
        x,
        embedding=(embedding, (len(embedding), *x.shape[1:])),
        weight=(weight, x.shape[1:]),
        out=(out, x.shape),
    )
    check("token_ids", token_ids, x.shape[:1], torch.int32, x.device)
    kernel, grid = _kernel("embed_rms_norm", x, overlap=False)
    kernel.launch(grid, token_ids, embedding, weight, x, out, epsilon)


def final_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    token_rows: torch.Tensor,
    sample_index: torch.Tensor,
    faulted: torch.Tensor,
    sizes: torch.Tensor,
    out: torch.Tensor,
    *,
    overlap: bool = False,
) -> None:
    """Look for faults in the hidden states h = x + delta of all tokens, and norm the sampled ones.

    For every token t < sizes[0]: where an element of h, rounded as x would store it, is not finite,
    faulted[token_rows[t]] = 1; where sample_index[t] >= 0, out[sample_index[t]] = rms_norm(h). All
    else in faulted and out stays. delta: None for 0.

    x, delta: [tokens, size]; weight: [size]; token_rows, sample_index: [tokens] int32; faulted:
    [table_rows] int32; sizes: [>= 1] int32; out: [max_samples, size]. Raises ValueError.
    """
    _check(x, weight=(weight, x.shape[1:]), out=(out, (len(out), *x.shape[1:])))
    if delta is not None:
        _check(x, delta=(delta, x.shape))
    check("token_rows", token_rows, x.shape[:1], torch.int32, x.device)
    check("sample_index", sample_index, x.shape[:1], torch.int32, x.device)
    check("faulted", faulted, (len(faulted),), torch.int32, x.device)
    check("sizes", sizes, (len(sizes),), torch.int32, x.device)
    kernel, grid = _kernel("final_norm", x, overlap)
    kernel.launch(
        grid,
        x,
        ctypes.c_void_p() if delta is None else delta,
        weight,
        token_rows,
        sample_index,
        faulted,
        sizes,
        out,
        epsilon,
    )


def _kernel(name: str, x: torch.Tensor, overlap: bool) -> tuple[Kernel, Grid]:
    tokens, size = x.shape
    compiled = constants(x.dtype, size)
    grid = Grid((tokens, 1, 1), int(compiled["THREADS"]), overlap=overlap)
    return load("norm", **compiled)[name], grid


def _check(x: torch.Tensor, **others: tuple[torch.Tensor, tuple[int, ...]]) -> None:
    require(x.ndim == 2, "x must be [tokens, size], not {}", x.shape)
    check("x", x, x.shape, x.dtype, x.device, alignment=VECTOR)
    for name, (tensor, shape) in others.items():
        check(name, tensor, shape, x.dtype, x.device, alignment=VECTOR)
