"""Prefill attention at Qwen3 shapes: the products with keys and values that a query may see."""

from __future__ import annotations

import functools

import torch

from mili.kernels.prefill_attention import TILE, PrefillAttention
from tests.performance.kernels.line import Line, line, timed

_DEVICE = torch.device("cuda")
_BLOCK = 16
_KV_HEADS = 8
_HEAD_DIM = 128
_LAYERS = 2
_MODELS = {"8B": 32, "0.6B": 16}  # heads
_BATCHES = ((1, 512), (16, 2048), (1, 8192), (1, 32768))
_OPERATIONS = 1e13  # of all calls of one replay, about


def lines() -> list[Line]:
    """Whole prompts, nothing cached; keys and values in random blocks."""
    return [
        _measure(model, heads, rows, length)
        for model, heads in _MODELS.items()
        for rows, length in _BATCHES
    ]


def _measure(model: str, heads: int, rows: int, length: int) -> Line:
    tokens, blocks = rows * length, length // _BLOCK
    shape = (_LAYERS, 1 + rows * blocks, 2 * _KV_HEADS, _BLOCK, _HEAD_DIM)
    cache = torch.empty(shape, dtype=torch.bfloat16, device=_DEVICE).normal_()
    qkv = torch.randn(tokens, heads + 2 * _KV_HEADS, _HEAD_DIM, device=_DEVICE).bfloat16()
    out = qkv.new_empty(tokens, heads * _HEAD_DIM)
    tables = torch.zeros(rows + 1, blocks, dtype=torch.int32, device=_DEVICE)
    tables[1:] = 1 + torch.randperm(rows * blocks, device=_DEVICE).view(rows, blocks)
    batch = torch.arange(rows + 1, dtype=torch.int32, device=_DEVICE)
    counts = torch.full_like(batch[:rows], length)
    sizes = torch.tensor([tokens, rows, 0, rows], dtype=torch.int32, device=_DEVICE)
    attention = PrefillAttention(qkv, cache, heads)
    calls = [
        functools.partial(
            attention.attend,
            layer,
            tables,
            batch[1:],
            torch.zeros_like(counts),
            counts,
            batch[:rows] * length,
            sizes,
            batch * (length // TILE),
            out,
        )
        for layer in range(_LAYERS)
    ]
    work = 4 * _HEAD_DIM * heads * rows * length * (length + 1) // 2
    repeat = min(20, max(1, int(_OPERATIONS / (work * _LAYERS))))
    seconds = timed(calls, repeat=repeat)
    return line("prefill_attention", f"{model} {rows} x {length}", seconds, work, "TFLOP/s")
