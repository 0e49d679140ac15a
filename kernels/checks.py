"""What every launch checks of its arguments: a few reads each, and no text unless one fails.

Owns the comparison and what it says. Does not know which kernel asks.
"""

from __future__ import annotations

import torch

VECTOR = 16  # bytes that a thread loads at once: the alignment of what is loaded so


def require(condition: bool, message: str, *values: object) -> None:
    """Raise ValueError(message) unless the condition holds; values fill the message's {}."""
    if not condition:
        raise ValueError(message.format(*values))


def check(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    alignment: int = 1,
) -> None:
    """Raise ValueError unless the tensor is all of this, contiguous, and at such an address.

    alignment: in bytes; 1 asks for no more than any tensor has.
    """
    if (
        tensor.shape != shape
        or tensor.dtype != dtype
        or tensor.device != device
        or not tensor.is_contiguous()
        or tensor.data_ptr() % alignment
    ):
        aligned = f" and aligned to {alignment} bytes" if alignment > 1 else ""
        raise ValueError(
            f"{name} must be {dtype} {list(shape)}, contiguous{aligned}, on {device}, not "
            f"{tensor.dtype} {list(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}, "
            f"at {tensor.data_ptr():#x}"
        )
