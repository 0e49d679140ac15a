"""Linear layers on the CPU: weights in oneDNN's own layout, read at the speed of memory.

Owns the layout. Does not know which layer of a model a weight belongs to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional


class LinearWeight(NamedTuple):
    """Made by `pack_linear`, read by `linear`; the layout of `weight` is this file's business."""

    weight: torch.Tensor  # [out_features, in_features] float32 or bfloat16
    bias: torch.Tensor | None  # [out_features]


def pack_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> LinearWeight:
    """Copy a plain weight, [out_features, in_features], into the layout that is read fastest."""
    if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"a linear weight is 2-D float32 or bfloat16, not {_describe(weight)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"bias {_describe(bias)} does not fit weight {_describe(weight)}")
    if _can_pack(weight.dtype):
        weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
    return LinearWeight(weight, bias)


def linear(x: torch.Tensor, layer: LinearWeight) -> torch.Tensor:
    """Return x @ weight.T + bias, [tokens, out_features], for x [tokens, in_features].

    A row's result does not depend on the other rows, to the last bit. That holds from two rows on:
    oneDNN takes another way for a lone float32 row, so a lone row is refused, and callers pad it.
    """
    _check(x, layer)
    if not layer.weight.is_mkldnn:
        return functional.linear(x, layer.weight, layer.bias)
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        x, layer.weight, layer.bias, "none", [], ""
    )
    return result


def linear_add(x: torch.Tensor, layer: LinearWeight, residual: torch.Tensor) -> torch.Tensor:
    """Return residual + linear(x), [tokens, out_features], in one pass."""
    _check(x, layer)
    if not layer.weight.is_mkldnn:
        return residual + functional.linear(x, layer.weight, layer.bias)
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
        x, residual, layer.weight, layer.bias, "add"
    )
    return result


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _check(x: torch.Tensor, layer: LinearWeight) -> None:
    if (
        x.ndim != 2
        or len(x) < 2
        or x.shape[1] != layer.weight.shape[1]
        or x.dtype != layer.weight.dtype
    ):
        raise ValueError(f"input {_describe(x)} does not fit weight {_describe(layer.weight)}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"
