"""How near a kernel's result must be to the oracle's.

Owns the bounds. Does not know what is computed.
"""

from __future__ import annotations

import torch

# Of the norm of a row's error, of that of the reference; and of the largest error, of its largest
# number.
_NORM, _LARGEST = 5e-3, 2e-2
# With fewer numbers a row, errors do not average out.
_FEW = 64


def assert_close(actual: torch.Tensor, expected: torch.Tensor, case: str) -> None:
    """Compare each row, along the last dimension, with a float64 reference.

    The bound on the norm of the error is statistical: rounding to bfloat16 moves a number by up to
    2^-9 of it, and many numbers by half of that together. With fewer than 64 numbers a row, one
    that was cancelled out, or rounded on its way, may carry the whole row: there the norm is bound
    like the largest error, by 2e-2.
    """
    error = actual.double() - expected
    norm = (error.norm(dim=-1) / expected.norm(dim=-1)).max().item()
    largest = (error.abs().amax(-1) / expected.abs().amax(-1)).max().item()
    limit = _LARGEST if expected.shape[-1] < _FEW else _NORM
    assert norm < limit and largest < _LARGEST, f"{case}: norm {norm:.2e}, largest {largest:.2e}"
