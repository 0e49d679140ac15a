"""Decode attention against a float64 oracle, with NaN wherever nothing may be read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("cupy")

import torch

from mili.kernels.decode_attention import NAME, DecodeAttention, constants
from mili.kernels.module import load_all

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
MAX_ROWS = 300
POSITIONS = 80_000  # of the cache
LONGEST = 32_768
PREFILL_TOKENS = 5  # of each prefill row
LENGTHS = (1, 15, 16, 17, 127, 1000, 4097)


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16

    def constants(self) -> dict[str, int | str]:
        return constants(
            num_heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            block_size=self.block_size,
            max_rows=MAX_ROWS,
        )

    def attention(self) -> DecodeAttention:
        return DecodeAttention(
            self.heads, self.kv_heads, self.head_dim, self.dtype, self.block_size, MAX_ROWS
        )


QWEN3_8B = Shape(32, 8, 128)
SMOLLM2 = Shape(9, 3, 64)
SHAPES = [
    *(
        Shape(heads, kv_heads, size)
        for heads, kv_heads in ((8, 8), (16, 8), (24, 8), (10, 2), (16, 2))
        for size in (64, 128)
    ),
    QWEN3_8B,
    SMOLLM2,
    Shape(28, 4, 128),
    Shape(6, 1, 64),
    Shape(32, 8, 128, block_size=32),
    Shape(9, 3, 64, block_size=48),
    Shape(16, 8, 128, dtype=torch.float16),
    Shape(8, 2, 64, block_size=32, dtype=torch.float16),
]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    load_all([(NAME, shape.constants()) for shape in SHAPES])


class Inputs:
    """A batch at fixed addresses, as a captured graph needs it."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.shape = shape
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator(DEVICE).manual_seed(seed)
        tokens, heads = MAX_ROWS + 50, shape.heads + 2 * shape.kv_heads
        num_blocks = POSITIONS // shape.block_size
        table = (MAX_ROWS + 2, LONGEST // shape.block_size + 2)
        cache = (num_blocks, 2 * shape.kv_heads, shape.block_size, shape.head_dim)
        self.qkv = torch.empty((tokens, heads, shape.head_dim), dtype=shape.dtype, device=DEVICE)
        self.cache = torch.empty(cache, dtype=shape.dtype, device=DEVICE)
        self.out = self.qkv.new_empty(tokens, shape.heads * shape.head_dim)
        sizes = (table, (MAX_ROWS,), (MAX_ROWS,), (4,), (MAX_ROWS + 1,))
        self.metadata = [torch.zeros(size, dtype=torch.int32, device=DEVICE) for size in sizes]
        self.newest: tuple[torch.Tensor, torch.Tensor] = (torch.empty(0), torch.empty(0))

    def fill(
        self, contexts: list[int], *, prefill_rows: int = 0, scale: float = 1.0
    ) -> torch.Tensor:
        """Returns what to expect: [decode rows, heads, head_dim] float64."""
        shape, rng, rows = self.shape, self.rng, len(contexts)
        tables = np.zeros(self.metadata[0].shape, np.int32)
        table_rows, starts = np.full((2, MAX_ROWS), -12345, np.int32)
        page_offsets = np.full(MAX_ROWS + 1, -12345, np.int32)
        any_rows = rng.permutation(np.arange(1, MAX_ROWS + 2))
        table_rows[: rows + prefill_rows] = any_rows[: rows + prefill_rows]
        starts[:rows], starts[rows : rows + prefill_rows] = np.array(contexts) - 1, 37
        page_offsets[: rows + 1] = np.cumsum([0, *(-(-length // 16) for length in contexts)])
        sizes = [rows + PREFILL_TOKENS * prefill_rows, rows + prefill_rows, rows, rows]
        free = rng.permutation(np.arange(1, len(self.cache)))
        blocks, offsets = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for row, length in zip(table_rows, contexts, strict=False):
            count = -(-length // shape.block_size)
            tables[row, :count], free = free[:count], free[count:]
            positions = np.arange(length)
            blocks.append(tables[row, positions // shape.block_size].astype(np.int64))
            offsets.append(positions % shape.block_size)
        for tensor, values in zip(
            self.metadata, (tables, table_rows, starts, np.array(sizes), page_offsets), strict=True
        ):
            tensor.copy_(torch.from_numpy(values))
        slots = torch.from_numpy(np.stack([np.concatenate(blocks), np.concatenate(offsets)]))
        slots = slots.to(DEVICE)

        kv = self._normal(sum(contexts), 2 * shape.kv_heads)
        kv[:, : shape.kv_heads] *= scale
        self.cache.fill_(torch.nan)
        self.cache[slots[0], :, slots[1]] = kv
        self.qkv.fill_(torch.nan)
        self.qkv[: sizes[0], : shape.heads] = self._normal(sizes[0], shape.heads) * scale
        self.newest = (slots[:, np.cumsum(contexts, dtype=np.int64) - 1], kv)
        return self._oracle(kv, contexts)

    def _normal(self, count: int, heads: int) -> torch.Tensor:
        size = (count, heads, self.shape.head_dim)
        return torch.randn(size, generator=self.generator, device=DEVICE).to(self.shape.dtype)

    def _oracle(self, kv: torch.Tensor, contexts: list[int]) -> torch.Tensor:
        shape = self.shape
        queries = self.qkv[:, : shape.heads].double().unflatten(1, (shape.kv_heads, -1))
        expected = torch.empty(len(contexts), shape.heads, shape.head_dim).double().to(DEVICE)
        for row, of_row in enumerate(kv.split(contexts)):
            keys, values = of_row.double().chunk(2, dim=1)  # [context, kv_heads, head_dim]
            scores = queries[row] @ keys.permute(1, 2, 0) * shape.head_dim**-0.5
            expected[row] = (scores.softmax(-1) @ values.transpose(0, 1)).flatten(0, 1)
        return expected

    def attend(self, attention: DecodeAttention) -> None:
        attention.attend(self.qkv, self.cache, *self.metadata, self.out)

    def poison(self, attention: DecodeAttention) -> None:
        attention.partials.fill_(torch.nan)
        self.out.fill_(torch.nan)

    def failures(
        self, name: str, attention: DecodeAttention, contexts: list[int], expected: torch.Tensor
    ) -> list[str]:
        rows, found = len(contexts), []
        if not self.out[rows:].isnan().all():
            found.append(f"{name}: rows that do not decode were written")
        if attention.counters.any():
            found.append(f"{name}: {int(attention.counters.count_nonzero())} counters are not zero")
        error = self.out[:rows].view(expected.shape).double() - expected
        norm = error.norm(dim=-1) / expected.norm(dim=-1)  # [rows, heads]
        largest = error.abs().amax(-1) / expected.abs().amax(-1)
        wrong = ~((norm < 5e-3) & (largest < 2e-2))
        if wrong.any():
            row, head = wrong.nonzero()[0].tolist()
            found.append(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} (row, head) wrong in rows "
                f"{wrong.any(1).nonzero().flatten().tolist()[:8]}, heads "
                f"{wrong.any(0).nonzero().flatten().tolist()}; first: row {row} head {head} context"
                f" {contexts[row]}: norm {norm[row, head]:.2e}, largest {largest[row, head]:.2e}; "
                f"worst {norm.max():.2e}, {largest.max():.2e}"
            )
        return found


def mixed(rows: int, longest: int, seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    some = rng.integers(1, longest, rows)
    usual = rng.choice([length for length in LENGTHS if length < longest], rows)
    lengths: list[int] = np.where(rng.random(rows) < 0.5, some, usual).tolist()
    return lengths


def check(shape: Shape, batches: dict[str, list[int]], scale: float = 1.0) -> None:
    attention, inputs = shape.attention(), Inputs(shape)
    found = []
    for name, contexts in batches.items():
        expected = inputs.fill(contexts, scale=scale)
        inputs.poison(attention)
        inputs.attend(attention)
        found += inputs.failures(name, attention, contexts, expected)
    assert not found, f"{shape}:\n" + "\n".join(found)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [QWEN3_8B, SMOLLM2])
def test_a_small_batch(shape: Shape) -> None:
    check(shape, {"5 rows": [17, 1, 130, 16, 64]})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_of_heads(shape: Shape) -> None:
    batches = {
        "7 rows": list(LENGTHS),
        "64 rows": mixed(64, 600, seed=1),
        "one long among short": [17] * 20 + [9000] + [3] * 20,
    }
    check(shape, batches)


@pytest.mark.parametrize("shape", [QWEN3_8B, SMOLLM2], ids=str)
def test_every_size_of_batch(shape: Shape) -> None:
    batches = {f"context {length}": [length] for length in (*LENGTHS, LONGEST)}
    batches |= {
        "2 rows": [4097, 15],
        "256 rows": mixed(256, 500, seed=2),
        "all the same": [576] * 64,
        "all rows, one position": [1] * MAX_ROWS,
        "one very long among short": [*mixed(100, 200, seed=3), LONGEST, *mixed(50, 40, seed=4)],
    }
    check(shape, batches)


@pytest.mark.parametrize("shape", [QWEN3_8B, SMOLLM2], ids=str)
def test_large_scores(shape: Shape) -> None:
    check(shape, {"scores of +-100": [1000, 17, 4097, 300]}, scale=5.0)


def test_a_replayed_graph_serves_any_batch() -> None:
    attention, inputs = QWEN3_8B.attention(), Inputs(QWEN3_8B)
    inputs.fill([100])
    inputs.attend(attention)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inputs.attend(attention)
    found = []
    for contexts in ([576], mixed(100, 900, seed=5), [], [LONGEST], [16] * 7, [3]):
        expected = inputs.fill(contexts, prefill_rows=4)
        inputs.poison(attention)
        graph.replay()
        name = f"{len(contexts)} rows"
        found += inputs.failures(name, attention, contexts, expected)
        first = inputs.out.clone()
        inputs.poison(attention)
        graph.replay()
        if not torch.equal(first.view(torch.int16), inputs.out.view(torch.int16)):
            found.append(f"{name}: a second launch gave other bits")
    assert not found, "\n".join(found)


def test_what_the_kernel_ahead_wrote_is_seen() -> None:
    attention, inputs = QWEN3_8B.attention(), Inputs(QWEN3_8B)
    contexts = mixed(30, 400, seed=6)
    expected = inputs.fill(contexts)
    queries = inputs.qkv.clone()
    (blocks, offsets), kv = inputs.newest
    newest = kv[np.cumsum(contexts) - 1]
    inputs.attend(attention)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inputs.cache[blocks, :, offsets] = newest
        inputs.qkv.copy_(queries)
        inputs.attend(attention)
    found = []
    for attempt in range(20):
        inputs.cache[blocks, :, offsets] = torch.nan
        inputs.qkv.fill_(torch.nan)
        inputs.poison(attention)
        graph.replay()
        found += inputs.failures(f"attempt {attempt}", attention, contexts, expected)
    assert not found, "\n".join(found)


def test_what_does_not_fit_is_refused() -> None:
    attention, inputs = SMOLLM2.attention(), Inputs(SMOLLM2)
    with pytest.raises(ValueError, match="12 heads"):
        DecodeAttention(12, 1, 64, torch.bfloat16, 16, MAX_ROWS)
    with pytest.raises(ValueError, match="head_dim 96"):
        DecodeAttention(8, 8, 96, torch.bfloat16, 16, MAX_ROWS)
    with pytest.raises(ValueError, match="qkv must be"):
        attention.attend(inputs.qkv[:, 1:], inputs.cache, *inputs.metadata, inputs.out)
    with pytest.raises(ValueError, match="out must be"):
        attention.attend(inputs.qkv, inputs.cache, *inputs.metadata, inputs.out.float())
