"""The kernels against the formulas, computed independently in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mili.kernels.linear import linear, linear_add, pack_linear
from mili.kernels.reference import (
    gather_samples,
    head_norm_,
    paged_attention,
    plan_attention,
    rms_norm,
    rope_,
    rope_angles,
    silu_and_mul,
    write_kv,
)

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_multiplies_and_adds(dtype: torch.dtype, bias: bool) -> None:
    x, weight, residual = draw(5, 96, dtype=dtype), draw(40, 96, dtype=dtype), draw(5, 40, seed=1)
    weight, residual = weight / 8, residual.to(dtype)
    offset = draw(40, dtype=dtype, seed=2) if bias else None
    expected = x.double() @ weight.double().T + (0 if offset is None else offset.double())
    layer = pack_linear(weight, offset)
    assert_near(linear(x, layer), expected)
    assert_near(linear_add(x, layer, residual), expected + residual.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_row_does_not_depend_on_the_other_rows(dtype: torch.dtype) -> None:
    layer, x = pack_linear(draw(960, 576, dtype=dtype)), draw(128, 576, dtype=dtype, seed=1)
    whole = linear(x, layer)
    for rows in (2, 3, 5, 16, 31, 100):
        assert torch.equal(linear(x[:rows], layer), whole[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = draw(7, 96, dtype=dtype) * 3, draw(96, dtype=dtype, seed=1)
    wide = x.double()
    scale = torch.sqrt((wide * wide).sum(dim=1, keepdim=True) / 96 + 1e-5)
    assert_near(rms_norm(x, weight, 1e-5), wide / scale * weight.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_norm_changes_the_given_heads_in_place(dtype: torch.dtype) -> None:
    qkv, weight = draw(5, 4, 64, dtype=dtype), draw(3, 64, dtype=dtype, seed=1)
    before = qkv.double()
    scale = torch.sqrt(before.square().mean(dim=2, keepdim=True) + 1e-6)
    head_norm_(qkv[:, :3], weight, 1e-6)
    assert_near(qkv[:, :3], (before / scale)[:, :3] * weight.double())
    assert torch.equal(qkv[:, 3].double(), before[:, 3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    gate_up = draw(5, 48, dtype=dtype) * 3
    gate, up = gate_up[:, :24].double(), gate_up[:, 24:].double()
    assert_near(silu_and_mul(gate_up), gate / (1 + torch.exp(-gate)) * up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_are_gathered_and_faults_of_all_tokens_marked(dtype: torch.dtype) -> None:
    x, attended = draw(6, 8, dtype=dtype), draw(6, 16, dtype=dtype, seed=1)
    rows, index = torch.tensor([3, 3, 4, 5, 6, 0]), torch.tensor([-1, 1, 0, -1, 2, 0])
    x[0, 7], attended[3, 15], x[5] = torch.nan, torch.inf, torch.nan  # the last is padding
    faulted, sizes = torch.zeros(8, dtype=torch.int32), torch.tensor([5, 4, 0, 3])
    out_x, out_attended = torch.zeros(4, 8, dtype=dtype), torch.zeros(4, 16, dtype=dtype)
    gather_samples(x, attended, rows, index, faulted, sizes, out_x, out_attended)
    assert faulted.tolist() == [0, 0, 0, 1, 0, 1, 0, 0]
    assert torch.equal(out_x[:3], x[[2, 1, 4]]) and not out_x[3].any()
    assert torch.equal(out_attended[:3], attended[[2, 1, 4]]) and not out_attended[3].any()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rope_rotates_pairs_by_the_position(head_dim: int) -> None:
    half = head_dim // 2
    frequencies = 10_000.0 ** (-torch.arange(half) / half)
    positions = torch.tensor([0, 1, 17, 8191])
    qkv = draw(4, 5, head_dim)
    before = qkv.double()
    rope_(qkv[:, :3], rope_angles(positions, frequencies, torch.float32))
    turn = torch.exp(1j * (positions[:, None].float() * frequencies).double())
    turned = torch.complex(before[..., :half], before[..., half:]) * turn[:, None]
    assert_near(qkv[:, :3], torch.cat((turned.real, turned.imag), dim=2)[:, :3])
    assert torch.equal(qkv[:, 3:].double(), before[:, 3:])


def test_write_kv_touches_its_slots_only() -> None:
    cache = torch.zeros(4, 3, 16, 64)
    kv, slots = draw(3, 4, 64), torch.tensor([16, 47, 5])
    write_kv(kv, cache, slots)
    flat = cache.flatten(1, 2)
    for token, slot in enumerate(slots.tolist()):
        assert torch.equal(flat[:, slot], kv[token])
        flat[:, slot] = 0
    assert not cache.any()


def naive_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One token: q [heads, head_dim]; keys, values [context, kv_heads, head_dim]."""
    output = torch.empty(q.shape, dtype=torch.float64)
    for head in range(len(q)):
        kv_head = head * keys.shape[1] // len(q)
        scores = keys[:, kv_head].double() @ q[head].double() / math.sqrt(q.shape[1])
        output[head] = scores.softmax(dim=0) @ values[:, kv_head].double()
    return output.flatten()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 3, 64), (6, 2, 64), (8, 1, 128)])
@pytest.mark.parametrize("max_blocks", [20, 1000])
def test_paged_attention(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, max_blocks: int
) -> None:
    """Rows of any length, in any state, in one batch; what no row holds is full of NaN."""
    block_size = 16
    rows = [(300, 1), (290, 1), (100, 1), (16, 1), (3, 1), (40, 1), (0, 1)]
    rows += [(0, 20), (31, 33), (7, 2), (2, 1), (60, 1)]
    starts, counts = np.array(rows).T
    contexts = starts + counts
    tables = np.zeros((len(rows), 20), np.int64)
    free = torch.randperm(99, generator=torch.Generator().manual_seed(3)).add(1).tolist()
    cache = torch.full((2 * kv_heads, 100, block_size, head_dim), torch.nan, dtype=dtype)
    for row, context in enumerate(contexts):
        for block in range(-(-int(context) // block_size)):
            tables[row, block] = free.pop()
            cache[:, tables[row, block]] = draw(2 * kv_heads, block_size, head_dim, seed=free[-1])
    queries = draw(int(counts.sum()), heads, head_dim, dtype=dtype)
    groups = plan_attention(
        tables, starts, counts, block_size=block_size, max_blocks=max_blocks, dtype=dtype
    )
    assert all(group.rows == 1 or len(group.blocks) <= max_blocks for group in groups)
    scratch = torch.empty(max_blocks * 2 * kv_heads * block_size * head_dim, dtype=dtype)
    output = paged_attention(queries, cache, groups, scratch)
    token = 0
    for row, (start, count) in enumerate(rows):
        blocks = tables[row, : -(-(start + count) // block_size)]
        kv = cache[:, torch.from_numpy(blocks)].flatten(1, 2).transpose(0, 1)
        for position in range(start, start + count):
            seen = kv[: position + 1]
            expected = naive_attention(queries[token], seen[:, :kv_heads], seen[:, kv_heads:])
            assert_near(output[token], expected)
            token += 1


def test_rows_of_similar_length_attend_together() -> None:
    starts = np.array([999, 600, 490, 100, 90, 3, 0])
    counts = np.array([1, 1, 1, 1, 1, 1, 5])
    tables = np.ones((7, 63), np.int64)
    plan = {"block_size": 16, "dtype": torch.float32}
    groups = plan_attention(tables, starts, counts, max_blocks=1000, **plan)
    assert [group.rows for group in groups] == [2, 1, 3, 1]
    assert [group.first_token for group in groups] == [0, 2, 3, 6]
    narrow = plan_attention(tables, starts, counts, max_blocks=63, **plan)
    assert [group.rows for group in narrow] == [1, 1, 1, 3, 1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: pack_linear(torch.zeros(4, 4, dtype=torch.float16)),
        lambda: pack_linear(torch.zeros(4, 4), torch.zeros(3)),
        lambda: linear(torch.zeros(2, 3), pack_linear(torch.zeros(4, 4))),
        lambda: linear(torch.zeros(1, 4), pack_linear(torch.zeros(4, 4))),
        lambda: linear(torch.zeros(2, 4, dtype=torch.bfloat16), pack_linear(torch.zeros(4, 4))),
        lambda: rms_norm(torch.zeros(2, 4), torch.zeros(3), 1e-5),
        lambda: head_norm_(torch.zeros(2, 3, 4), torch.zeros(4), 1e-5),
        lambda: silu_and_mul(torch.zeros(2, 5)),
        lambda: write_kv(torch.zeros(2, 4, 64), torch.zeros(6, 3, 16, 64), torch.zeros(2).long()),
        lambda: paged_attention(
            torch.zeros(2, 4, 64), torch.zeros(6, 3, 16, 64), (), torch.zeros(0)
        ),
    ],
)
def test_wrong_shapes_are_refused(call: object) -> None:
    with pytest.raises(ValueError, match=r"must|does not fit|float32 or bfloat16"):
        call()  # type: ignore[operator]
