"""Projections of steps of few rows: every weight is read once, at the speed of memory.

Owns how weight rows are divided over warps, and which kernel multiplies: up to VECTOR_ROWS rows one
by one, more on tensor cores. Does not know which projection of a model it computes, nor when it is
faster than a matrix product: the caller chooses, for up to `max_rows` rows.

Overlap (programmatic dependent launch). With overlap=True a kernel may begin while earlier kernels
of the stream still run, and loads its first weights meanwhile. What makes this safe:
- Before griddepcontrol.wait it touches weights only (the matrix and the norm's weight), which no
  kernel of the stream writes. x, residual and out may still be written, or read, by kernels that
  have not ended.
- The wait returns when the kernel before has ended and its writes can be seen. That kernel in turn
  waited before it ended, so all kernels before it have ended too. So nobody still reads what is now
  overwritten: activations need no second buffer.
- Hence the rule for every kernel that is launched with overlap: at least one thread of it waits,
  whatever else it does, and none touches what any earlier kernel wrote, not only the last one,
  before it has waited. A kernel launched without overlap begins after all others; one that never
  releases its successor does so by ending.
- The successor is released at once, before the wait: it cannot be placed before every block of this
  kernel has been, so it takes no room from it.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from mili.kernels.checks import VECTOR, check, require
from mili.kernels.module import Argument, Constant, Grid, dtype_name, load

# Rows of x for which ordinary arithmetic is faster than tensor cores.
VECTOR_ROWS = 2
_TILE_ROWS, _CHUNK = 8, 32
_THREADS = 256
_WARPS = _THREADS // 32
# Of shared memory for each row of x, beside the row: sums that warps tell each other.
_SCRATCH = 4 * (_WARPS + 2 * _WARPS)
# The same on tensor cores, for all rows together: four sums and a square of every lane.
_TILE_SCRATCH = 4 * 5 * _THREADS
# A row is shared by more warps while a multiprocessor has fewer than this, and a lane of them would
# have 16 bytes of it at least; or 64 bytes, while it has fewer than enough. Measured on an H100.
_FEW_WARPS = 12
_WARPS_ENOUGH = 32

Source = tuple[str, dict[str, Constant]]


def max_rows(dtype: torch.dtype, *sizes: int) -> int:
    """Rows of x that a launch takes; sizes: elements of a row, k, of each product.

    On tensor cores a norm may pass the range of float16.
    """
    on_tensor_cores = dtype == torch.bfloat16 and not any(k % _CHUNK for k in sizes)
    return _TILE_ROWS if on_tensor_cores else VECTOR_ROWS


def source(dtype: torch.dtype, *, rows: int, n: int, k: int, gated: bool = False) -> Source:
    """The source and its constants for an output of n columns. Raises ValueError.

    gated: `gemv_swiglu`, whose weight has 2 * n rows.
    """
    limit = max_rows(dtype, k)
    require(k > 0 and k % 8 == 0, "a row must have a multiple of 8 elements, not {}", k)
    require(1 <= rows <= limit, "x must have 1 to {} rows, not {}", limit, rows)
    pairs = n if gated else -(-n // 2)
    if rows <= VECTOR_ROWS:
        return "gemv", _vector_constants(dtype, rows, pairs, k)
    return "gemv_mma", _tile_constants(dtype, _num_units(n, gated), k)


def _vector_constants(dtype: torch.dtype, rows: int, pairs: int, k: int) -> dict[str, Constant]:
    processors = _multiprocessors(torch.cuda.current_device())
    split = 1
    while split < _WARPS:
        warps, vectors = pairs * split / processors, k // (2 * split * 32 * 8)
        if not (warps < _FEW_WARPS and vectors >= 1) and not (
            warps < _WARPS_ENOUGH and vectors >= 4
        ):
            break
        split *= 2
    return {"SCALAR": dtype_name(dtype), "K": k, "ROWS": rows, "SPLIT": split}


def _num_units(n: int, gated: bool) -> int:
    """Of 16 weight rows, or of 8 gate rows and their up rows."""
    return -(-n // 8) if gated else -(-n // 16)


def _tile_constants(dtype: torch.dtype, units: int, k: int) -> dict[str, Constant]:
    # Few thread blocks keep more in flight each. Measured on an H100.
    crowded = units > 2 * _multiprocessors(torch.cuda.current_device())
    depth, blocks = (2, 3) if crowded else (4, 2)
    return {"SCALAR": dtype_name(dtype), "K": k, "MAX_DEPTH": depth, "BLOCKS": blocks}


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    epsilon: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    overlap: bool = False,
) -> None:
    """out = residual + norm(x) @ weight.T + bias, accumulated in float32 and rounded once.

    norm: RMSNorm with norm_weight and epsilon, rounded to x's dtype; none without norm_weight.
    x: [rows, k] bfloat16 or float16, at most max_rows(dtype, k) rows; weight: [n, k]; out:
    [rows, n], which must not be x; norm_weight: [k]; bias: [n]; residual: [rows, n], which may be
    out. All of one dtype and contiguous. Raises ValueError.
    """
    n, k = len(weight), x.shape[-1]
    _check(
        x,
        out,
        {
            "weight": (weight, (n, k)),
            "norm_weight": (norm_weight, (k,)),
            "bias": (bias, (n,)),
            "residual": (residual, (len(x), n)),
        },
        n=n,
    )
    added = (_address(bias), _address(residual))
    if norm_weight is None:
        _launch("gemv", x, weight, out, overlap, *added)
    else:
        _launch("gemv_norm", x, weight, out, overlap, norm_weight, *added, after=(epsilon,))


def gemv_swiglu(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    norm_weight: torch.Tensor,
    epsilon: float,
    overlap: bool = False,
) -> None:
    """out = silu(norm(x) @ gate.T) * (norm(x) @ up.T), rounded once; norm as in `gemv`.

    x: [rows, k]; weight: [2 * n, k], the rows of gate before those of up; out: [rows, n];
    norm_weight: [k]. Raises ValueError.
    """
    n, k = len(weight) // 2, x.shape[-1]
    _check(x, out, {"weight": (weight, (2 * n, k)), "norm_weight": (norm_weight, (k,))}, n=n)
    _launch("gemv_swiglu", x, weight, out, overlap, norm_weight, after=(epsilon,))


def gemv_logits(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, overlap: bool = False
) -> None:
    """out = x @ weight.T in float32, for up to VECTOR_ROWS rows.

    x: [rows, k], normed; weight: [n, k]; out: [rows, n] float32. Raises ValueError.
    """
    n = len(weight)
    require(len(x) <= VECTOR_ROWS, "x must have 1 to {} rows, not {}", VECTOR_ROWS, len(x))
    _check(x, out, {"weight": (weight, (n, x.shape[-1]))}, n=n, out_dtype=torch.float32)
    _launch("gemv_logits", x, weight, out, overlap)


def _launch(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    overlap: bool,
    *more: Argument,
    after: tuple[Argument, ...] = (),
) -> None:
    """The kernel's arguments: x, weight, out, more, (rows on tensor cores,) n, after."""
    (rows, k), n = x.shape, out.shape[1]
    gated = name == "gemv_swiglu"
    module, compiled = source(x.dtype, rows=rows, n=n, k=k, gated=gated)
    kernel = load(module, **compiled)[name]
    if module == "gemv_mma":
        grid = Grid((_num_units(n, gated), 1, 1), _THREADS, _TILE_SCRATCH, overlap)
        kernel.launch(grid, x, weight, out, *more, rows, n, *after)
        return
    pairs = n if gated else -(-n // 2)
    staged = rows + (name in ("gemv_norm", "gemv_swiglu"))
    shared = rows * _SCRATCH + staged * k * x.element_size()
    blocks = -(-pairs * int(compiled["SPLIT"]) // _WARPS)
    grid = Grid((blocks, 1, 1), _THREADS, shared, overlap)
    kernel.launch(grid, x, weight, out, *more, n, *after)


@functools.cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _address(tensor: torch.Tensor | None) -> Argument:
    return ctypes.c_void_p() if tensor is None else tensor


def _check(
    x: torch.Tensor,
    out: torch.Tensor,
    others: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]],
    *,
    n: int,
    out_dtype: torch.dtype | None = None,
) -> None:
    require(x.ndim == 2, "x must be [rows, k], not {}", x.shape)
    require(out.data_ptr() != x.data_ptr(), "out must not be x, which every thread block reads")
    check("x", x, x.shape, x.dtype, x.device, alignment=VECTOR)
    check("out", out, (len(x), n), out_dtype or x.dtype, x.device, alignment=VECTOR)
    for name, (tensor, shape) in others.items():
        if tensor is not None:
            check(name, tensor, shape, x.dtype, x.device, alignment=VECTOR)
