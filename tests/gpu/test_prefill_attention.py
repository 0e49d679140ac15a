"""Prefill attention against a float64 oracle, with NaN wherever nothing may be read."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("cupy")

import torch

from mili.kernels.module import load_all
from mili.kernels.prefill_attention import TILE, PrefillAttention, source

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
MAX_ROWS = 70  # three times the rows that a warp finds its tile among at once
MAX_TOKENS = 32_768 + 100
POSITIONS = 40_000  # of the cache
LAYERS, LAYER = 2, 1
ORACLE_SCORES = 2**26  # at once


class Row(NamedTuple):
    start: int
    new: int  # tokens


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16


QWEN3_8B = Shape(32, 8, 128)
SMOLLM2 = Shape(9, 3, 64)
SMALL = Shape(2, 1, 128)
SHAPES = [
    *(
        Shape(heads, kv_heads, size)
        for heads, kv_heads in ((3, 3), (6, 3), (8, 2), (10, 2), (16, 2))
        for size in (64, 128)
    ),
    QWEN3_8B,
    SMOLLM2,
    Shape(4, 2, 128, block_size=32),
    Shape(4, 2, 64, block_size=48),
    Shape(4, 2, 128, dtype=torch.float16),
    Shape(4, 1, 64, block_size=32, dtype=torch.float16),
]
PROMPTS = [Row(0, count) for count in (15, 16, 17, 127, 128, 129, 1000, 2, 255, 257)]
CHUNKS = [
    Row(start, count)
    for start, count in (
        (1, 2), (15, 17), (16, 16), (37, 100), (127, 129), (128, 128), (300, 513), (511, 130),
        (1000, 17), (1024, 256), (4000, 97),
    )
]  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["mma", "hopper"])
def use_hopper(request: pytest.FixtureRequest) -> bool:
    wanted: bool = request.param
    if wanted and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper device")
    kinds = {(shape.dtype, shape.head_dim) for shape in SHAPES}
    load_all([source(dtype, size, use_hopper=wanted) for dtype, size in kinds])
    return wanted


class Inputs:
    """A batch at fixed addresses, as a captured graph needs it, and the attention over it."""

    def __init__(self, shape: Shape, use_hopper: bool, seed: int = 0) -> None:
        self.shape = shape
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator(DEVICE).manual_seed(seed)
        heads = shape.heads + 2 * shape.kv_heads
        blocks = (LAYERS, POSITIONS // shape.block_size, 2 * shape.kv_heads, shape.block_size)
        self.qkv = torch.empty(
            (MAX_TOKENS, heads, shape.head_dim), dtype=shape.dtype, device=DEVICE
        )
        self.cache = torch.empty((*blocks, shape.head_dim), dtype=shape.dtype, device=DEVICE)
        self.out = self.qkv.new_empty(MAX_TOKENS, shape.heads * shape.head_dim)
        table = (MAX_ROWS + 2, POSITIONS // shape.block_size)
        sizes = (table, *[(MAX_ROWS,)] * 4, (4,), (MAX_ROWS + 1,))
        self.metadata = [torch.zeros(size, dtype=torch.int32, device=DEVICE) for size in sizes]
        self.attention = PrefillAttention(self.qkv, self.cache, shape.heads, use_hopper=use_hopper)
        self.rows: list[Row] = []
        self.num_decode_rows = 0
        self.written = (torch.empty(0), torch.empty(0))

    def fill(
        self, prefills: Sequence[Row], decodes: Sequence[int] = (), scale: float = 1.0
    ) -> torch.Tensor:
        """Returns what to expect of the prefill tokens: [tokens, heads, head_dim] float64."""
        shape = self.shape
        self.rows = [*(Row(start, 1) for start in decodes), *prefills]
        self.num_decode_rows = len(decodes)
        slots = self._fill_metadata()
        kv = self._normal(slots.shape[1], 2 * shape.kv_heads)
        kv[:, : shape.kv_heads] *= scale
        self.cache.fill_(torch.nan)
        self.cache[LAYER, slots[0], :, slots[1]] = kv
        self.written = (slots, kv)
        self.qkv.fill_(torch.nan)
        tokens = sum(row.new for row in self.rows)
        self.qkv[:tokens, : shape.heads] = self._normal(tokens, shape.heads) * scale
        return self._oracle(kv)

    def _fill_metadata(self) -> torch.Tensor:
        """Returns block and offset of each position of each row: [2, positions]."""
        rng, block_size, num_rows = self.rng, self.shape.block_size, len(self.rows)
        tables = np.zeros(self.metadata[0].shape, np.int32)
        columns = np.full((4, MAX_ROWS), -12345, np.int32)
        table_rows = rng.permutation(np.arange(1, MAX_ROWS + 2))[:num_rows]
        starts, counts = np.array(self.rows, np.int32).reshape(-1, 2).T
        columns[:, :num_rows] = table_rows, starts, counts, np.cumsum(counts) - counts
        sizes = np.array([counts.sum(), num_rows, self.num_decode_rows, num_rows], np.int32)
        tiles = [-(-row.new // TILE) for row in self.rows[self.num_decode_rows :]]
        tile_offsets = np.full(MAX_ROWS + 1, -12345, np.int32)
        tile_offsets[: len(tiles) + 1] = [0, *itertools.accumulate(tiles)]
        free = rng.permutation(np.arange(1, self.cache.shape[1]))
        slots = [np.empty((2, 0), np.int64)]
        for table_row, row in zip(table_rows, self.rows, strict=True):
            positions = np.arange(row.start + row.new)
            count = -(-len(positions) // block_size)
            tables[table_row, :count], free = free[:count], free[count:]
            blocks = tables[table_row, positions // block_size]
            slots.append(np.stack([blocks, positions % block_size]))
        for tensor, values in zip(
            self.metadata, (tables, *columns, sizes, tile_offsets), strict=True
        ):
            tensor.copy_(torch.from_numpy(values))
        return torch.from_numpy(np.concatenate(slots, axis=1)).to(DEVICE)

    def _normal(self, count: int, heads: int) -> torch.Tensor:
        size = (count, heads, self.shape.head_dim)
        return torch.randn(size, generator=self.generator, device=DEVICE).to(self.shape.dtype)

    def _oracle(self, kv: torch.Tensor) -> torch.Tensor:
        shape = self.shape
        queries = self.qkv[:, : shape.heads].unflatten(1, (shape.kv_heads, -1))
        expected = [torch.empty(0, shape.heads, shape.head_dim).double().to(DEVICE)]
        of_rows = kv.split([row.start + row.new for row in self.rows])
        first_token = self.num_decode_rows
        for row, of_row in list(zip(self.rows, of_rows, strict=True))[self.num_decode_rows :]:
            keys, values = of_row.double().transpose(0, 1).chunk(2)  # [kv_heads, context, size]
            step = max(1, ORACLE_SCORES // (len(of_row) * shape.heads))
            for first in range(0, row.new, step):
                some = slice(first_token + first, first_token + min(first + step, row.new))
                start = row.start + first
                expected.append(_attend(queries[some].double(), keys, values, start))
            first_token += row.new
        return torch.cat(expected)

    def attend(self) -> None:
        self.attention.attend(LAYER, *self.metadata, self.out)

    def failures(self, name: str, expected: torch.Tensor) -> list[str]:
        found = []
        first = self.num_decode_rows
        last = first + len(expected)
        if not (self.out[:first].isnan().all() and self.out[last:].isnan().all()):
            found.append(f"{name}: tokens that do not prefill were written")
        if self.attention.scheduler.any():
            found.append(f"{name}: the scheduler was left at {self.attention.scheduler.tolist()}")
        error = self.out[first:last].view(expected.shape).double() - expected
        norm = error.norm(dim=-1) / expected.norm(dim=-1)  # [tokens, heads]
        largest = error.abs().amax(-1) / expected.abs().amax(-1)
        wrong = ~((norm < 5e-3) & (largest < 2e-2))
        if wrong.any():
            found.append(f"{name}: {self._describe(wrong, norm, largest)}")
        return found

    def _describe(self, wrong: torch.Tensor, norm: torch.Tensor, largest: torch.Tensor) -> str:
        rows = self.rows[self.num_decode_rows :]
        spots = []
        for row, of_row in zip(rows, wrong.split([row.new for row in rows]), strict=True):
            queries = of_row.any(1).nonzero().flatten().tolist()
            if queries:
                spots.append(f"{tuple(row)}: {len(queries)} in {queries[0]}..{queries[-1]}")
        token, head = wrong.nonzero()[0].tolist()
        return (
            f"{int(wrong.sum())} of {wrong.numel()} (query, head) wrong, of them "
            f"{int(norm.isnan().sum())} NaN; heads {wrong.any(0).nonzero().flatten().tolist()}; "
            f"queries by row (start, new): {'; '.join(spots[:6])}; first: token {token} head "
            f"{head}: norm {norm[token, head]:.2e}, largest {largest[token, head]:.2e}; "
            f"worst {norm.nan_to_num().max():.2e}, {largest.nan_to_num().max():.2e}"
        )


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int
) -> torch.Tensor:
    """queries: [count, kv_heads, group, size]; keys, values: [kv_heads, context, size]."""
    end = start + len(queries)
    q = queries.permute(1, 2, 0, 3)  # [kv_heads, group, count, size]
    scores = q @ keys[:, None, :end].transpose(2, 3) * queries.shape[-1] ** -0.5
    positions = torch.arange(end, device=DEVICE)
    scores.masked_fill_(positions > positions[start:, None], -torch.inf)
    return (scores.softmax(-1) @ values[:, None, :end]).permute(2, 0, 1, 3).flatten(1, 2)


def check(
    shape: Shape,
    use_hopper: bool,
    batches: Mapping[str, tuple[Sequence[Row], Sequence[int]]],
    scale: float = 1.0,
) -> None:
    """batches: rows that prefill, and positions of those that decode."""
    inputs = Inputs(shape, use_hopper)
    found = []
    for name, (prefills, decodes) in batches.items():
        expected = inputs.fill(prefills, decodes, scale)
        inputs.out.fill_(torch.nan)
        inputs.attend()
        found += inputs.failures(name, expected)
    assert not found, f"{shape}:\n" + "\n".join(found)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [SMALL, SMOLLM2], ids=str)
def test_a_small_batch(shape: Shape, use_hopper: bool) -> None:
    check(shape, use_hopper, {"3 rows": ([Row(0, 17), Row(120, 140), Row(0, 128)], [5])})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_of_heads(shape: Shape, use_hopper: bool) -> None:
    batches = {"prompts": (PROMPTS, [0, 16, 300]), "chunks": (CHUNKS, [77])}
    check(shape, use_hopper, batches)


@pytest.mark.parametrize("shape", [QWEN3_8B, SMOLLM2], ids=str)
def test_every_length(shape: Shape, use_hopper: bool) -> None:
    batches: dict[str, tuple[Sequence[Row], Sequence[int]]] = {
        f"prompt of {row.new}": ([row], []) for row in PROMPTS
    }
    batches |= {f"{row.new} after {row.start}": ([row], [3]) for row in CHUNKS}
    batches |= {"prompt of 4097": ([Row(0, 4097)], [])}
    check(shape, use_hopper, batches)


def test_many_rows(use_hopper: bool) -> None:
    rng = np.random.default_rng(7)
    mixed = [Row(int(rng.integers(200)), int(rng.integers(2, 400))) for _ in range(MAX_ROWS)]
    batches: dict[str, tuple[Sequence[Row], Sequence[int]]] = {
        "as many as fit": (mixed, []),
        "two tokens each": ([Row(3, 2)] * (MAX_ROWS - 20), [100] * 20),
        "none": ([], [100] * 20),
    }
    check(SMOLLM2, use_hopper, batches)


def test_a_very_long_prompt(use_hopper: bool) -> None:
    check(SMALL, use_hopper, {"32768": ([Row(0, 32_768)], [9])})


def test_large_scores(use_hopper: bool) -> None:
    check(SMALL, use_hopper, {"scores of +-100": ([Row(0, 1000), Row(300, 513)], [])}, scale=5.0)


def test_a_replayed_graph_serves_any_batch(use_hopper: bool) -> None:
    inputs = Inputs(QWEN3_8B, use_hopper)
    inputs.fill([Row(0, 100)])
    inputs.attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inputs.attend()
    found = []
    for prefills, decodes in ((PROMPTS, [3]), (CHUNKS, []), ([], [8] * 9), ([Row(0, 3000)], [1])):
        expected = inputs.fill(prefills, decodes)
        inputs.out.fill_(torch.nan)
        graph.replay()
        name = f"{len(prefills)} rows after {len(decodes)} that decode"
        found += inputs.failures(name, expected)
        first = inputs.out.clone()
        inputs.out.fill_(torch.nan)
        graph.replay()
        if not torch.equal(first.view(torch.int16), inputs.out.view(torch.int16)):
            found.append(f"{name}: a second launch gave other bits")
    assert not found, "\n".join(found)


def test_what_the_kernel_ahead_wrote_is_seen(use_hopper: bool) -> None:
    inputs = Inputs(SMOLLM2, use_hopper)
    expected = inputs.fill(PROMPTS, [3])
    queries = inputs.qkv.clone()
    (blocks, offsets), kv = inputs.written
    inputs.attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inputs.qkv.copy_(queries)
        inputs.cache[LAYER, blocks, :, offsets] = kv
        inputs.attend()
    found = []
    for attempt in range(10):
        inputs.cache.fill_(torch.nan)
        inputs.qkv.fill_(torch.nan)
        inputs.out.fill_(torch.nan)
        graph.replay()
        found += inputs.failures(f"attempt {attempt}", expected)
    assert not found, "\n".join(found)


def test_what_does_not_fit_is_refused(use_hopper: bool) -> None:
    inputs = Inputs(SMALL, use_hopper)
    with pytest.raises(ValueError, match="9 heads"):
        PrefillAttention(inputs.qkv, inputs.cache, 9, use_hopper=use_hopper)
    with pytest.raises(ValueError, match="block_size 8"):
        PrefillAttention(inputs.qkv, inputs.cache[:, :, :, :8], 2, use_hopper=use_hopper)
    with pytest.raises(ValueError, match="head_dim 96"):
        PrefillAttention(inputs.qkv, inputs.cache[..., :96], 2, use_hopper=use_hopper)
    with pytest.raises(ValueError, match="qkv_buffer must be"):
        PrefillAttention(inputs.qkv[:, 1:], inputs.cache, 2, use_hopper=use_hopper)
    with pytest.raises(ValueError, match="layer 2"):
        inputs.attention.attend(2, *inputs.metadata, inputs.out)
    with pytest.raises(ValueError, match="out must be"):
        inputs.attention.attend(0, *inputs.metadata, inputs.out.float())
