"""After a step's last attention only the tokens that sample go on: they are gathered, all checked.

Owns the shapes. Does not know what is done with the samples.
"""

from __future__ import annotations

import torch

from mili.kernels.checks import VECTOR, check, require
from mili.kernels.module import Constant, Grid, dtype_name, load

_THREADS = 256


def constants(dtype: torch.dtype, hidden: int, attended: int) -> dict[str, Constant]:
    """What "samples" is compiled with: elements of a token before and after attention.

    Raises ValueError.
    """
    for size in (hidden, attended):
        require(
            size > 0 and size % 8 == 0, "a token must have a multiple of 8 elements, not {}", size
        )
    return {"SCALAR": dtype_name(dtype), "HIDDEN": hidden, "ATTENDED": attended}


def gather_samples(
    x: torch.Tensor,
    attended: torch.Tensor,
    token_rows: torch.Tensor,
    sample_index: torch.Tensor,
    faulted: torch.Tensor,
    sizes: torch.Tensor,
    out_x: torch.Tensor,
    out_attended: torch.Tensor,
    *,
    overlap: bool = False,
) -> None:
    """Look for faults in x and attended of all tokens, and copy those of the tokens that sample.

    For every token t < sizes[0]: where an element of x[t] or attended[t] is not finite,
    faulted[token_rows[t]] = 1; where s = sample_index[t] >= 0, out_x[s] = x[t] and out_attended[s]
    = attended[t]. All else in faulted, out_x and out_attended stays.

    x: [tokens, hidden], attended: [tokens, heads * head_dim], bfloat16 or float16; token_rows,
    sample_index: [tokens] int32; faulted: [table_rows] int32; sizes: [>= 1] int32; out_x:
    [max_samples, hidden]; out_attended: [max_samples, heads * head_dim]. All contiguous. overlap:
    as in norm.py. Raises ValueError.
    """
    require(x.ndim == attended.ndim == 2, "x and attended must be [tokens, size]")
    compiled = constants(x.dtype, x.shape[1], attended.shape[1])
    tokens, samples, device = len(x), len(out_x), x.device
    for name, tensor, shape in (
        ("x", x, x.shape),
        ("attended", attended, (tokens, attended.shape[1])),
        ("out_x", out_x, (samples, x.shape[1])),
        ("out_attended", out_attended, (samples, attended.shape[1])),
    ):
        check(name, tensor, shape, x.dtype, device, alignment=VECTOR)
    check("token_rows", token_rows, (tokens,), torch.int32, device)
    check("sample_index", sample_index, (tokens,), torch.int32, device)
    check("faulted", faulted, (len(faulted),), torch.int32, device)
    check("sizes", sizes, (len(sizes),), torch.int32, device)
    load("samples", **compiled)["gather_samples"].launch(
        Grid((tokens, 1, 1), _THREADS, overlap=overlap),
        x,
        attended,
        token_rows,
        sample_index,
        faulted,
        sizes,
        out_x,
        out_attended,
    )
