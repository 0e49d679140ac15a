"""Decode attention at Qwen3 shapes: the bytes of all keys and values, read once."""

from __future__ import annotations

import functools

import torch

from mili.kernels.decode_attention import DecodeAttention
from tests.performance.kernels.line import Line, line, timed

_DEVICE = torch.device("cuda")
_BLOCK = 16
_MAX_ROWS = 256
_KV_HEADS = 8
_HEAD_DIM = 128
_POSITION = 2 * _KV_HEADS * _HEAD_DIM * 2  # bytes
_CACHE_BYTES = 400e6  # of all layers together at least: eight times the L2 cache
_MODELS = {"8B": 32, "0.6B": 16}  # heads
_BATCHES = ((1, 576), (8, 576), (64, 576), (256, 576), (16, 4096), (1, 32768))


def lines() -> list[Line]:
    """Calls follow each other as overlapped launches, as they follow the kernel ahead in a step."""
    return [
        _measure(model, heads, rows, context)
        for model, heads in _MODELS.items()
        for rows, context in _BATCHES
    ]


def _measure(model: str, heads: int, rows: int, context: int) -> Line:
    attention = DecodeAttention(heads, _KV_HEADS, _HEAD_DIM, torch.bfloat16, _BLOCK, _MAX_ROWS)
    work = rows * context * _POSITION
    layers = max(2, int(-(-_CACHE_BYTES // work)))
    blocks = context // _BLOCK
    cache = torch.empty(
        (layers, 1 + rows * blocks, 2 * _KV_HEADS, _BLOCK, _HEAD_DIM),
        dtype=torch.bfloat16,
        device=_DEVICE,
    ).normal_()
    qkv = torch.randn(rows, heads + 2 * _KV_HEADS, _HEAD_DIM, device=_DEVICE).bfloat16()
    out = qkv.new_empty(rows, heads * _HEAD_DIM)
    tables = torch.zeros(_MAX_ROWS + 1, blocks, dtype=torch.int32, device=_DEVICE)
    tables[1 : rows + 1] = 1 + torch.randperm(rows * blocks, device=_DEVICE).view(rows, blocks)
    table_rows = torch.arange(1, _MAX_ROWS + 1, dtype=torch.int32, device=_DEVICE)
    starts = torch.full_like(table_rows, context - 1)
    sizes = torch.tensor([rows] * 4, dtype=torch.int32, device=_DEVICE)
    pages = -(-context // 16)
    page_offsets = torch.arange(_MAX_ROWS + 1, dtype=torch.int32, device=_DEVICE) * pages
    calls = [
        functools.partial(
            attention.attend, qkv, layer, tables, table_rows, starts, sizes, page_offsets, out
        )
        for layer in cache
    ]
    seconds = timed(calls, repeat=-(-100 // layers))
    return line("decode_attention", f"{model} {rows} x {context}", seconds, work, "GB/s")
