"""QK-norm, rotation and the write into the paged cache, against float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("cupy")

from mili.kernels import reference
from mili.kernels.rope import qk_norm_rope_write, rope_table
from tests.gpu.compare import assert_close

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16)
TOKENS = (1, 2, 3, 17, 256, 1000, 8192)
LENGTH = 40961
EPSILON = 1e-6


class Shape(NamedTuple):
    num_heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 16


SHAPES = (
    Shape(16, 8, 128),
    Shape(32, 8, 128),
    Shape(9, 3, 64),
    Shape(5, 1, 128),
    Shape(8, 1, 64, 32),
    Shape(4, 4, 64),
    Shape(20, 4, 128, 48),
)


def frequencies(head_dim: int) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=DEVICE) / head_dim
    return 1.0 / 1e6**exponents


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


class Case:
    """A step's tensors, the cache poisoned, and what must be in qkv and in the cache after it."""

    def __init__(self, shape: Shape, tokens: int, dtype: torch.dtype, with_norm: bool) -> None:
        heads, kv_heads, head_dim, block_size = shape
        self.shape, self.with_norm = shape, with_norm
        self.qkv = random(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
        self.norms = [random(head_dim, dtype=dtype) if with_norm else None for _ in range(2)]
        self.frequencies = frequencies(head_dim)
        self.table = rope_table(self.frequencies, LENGTH, 1.0)
        self.positions = torch.randint(LENGTH, (tokens,), dtype=torch.int32, device=DEVICE)
        self.positions[-1] = LENGTH - 1
        num_blocks = -(-tokens // block_size) + 3
        shuffled = torch.randperm((num_blocks - 1) * block_size, device=DEVICE)[:tokens]
        self.slots = (shuffled + block_size).int()  # none in the null block
        shape_of_cache = num_blocks, 2 * kv_heads, block_size, head_dim
        self.cache = torch.full(shape_of_cache, torch.nan, dtype=dtype, device=DEVICE)

    def run(self, *, overlap: bool = False) -> None:
        qk_norm_rope_write(
            self.qkv,
            *self.norms,
            self.table,
            self.positions,
            self.slots,
            self.cache,
            self.shape.num_heads,
            EPSILON,
            overlap=overlap,
        )

    def expected(self) -> torch.Tensor:
        """qkv in float64 with queries and keys normed and rotated."""
        qkv = self.qkv.double()
        rotated = qkv[:, : self.shape.num_heads + self.shape.kv_heads]
        if self.with_norm:
            counts = self.shape.num_heads, self.shape.kv_heads
            weights = [
                norm.double().expand(count, -1)
                for norm, count in zip(self.norms, counts, strict=True)
                if norm is not None
            ]
            reference.head_norm_(rotated, torch.cat(weights), EPSILON)
        angles = reference.rope_angles(self.positions.long(), self.frequencies, torch.float64)
        reference.rope_(rotated, angles)
        return qkv

    def places(self) -> tuple[torch.Tensor, slice, torch.Tensor]:
        """The slots as an index of the cache, for [tokens, 2 * kv_heads, head_dim]."""
        slots = self.slots.long()
        return slots // self.shape.block_size, slice(None), slots % self.shape.block_size

    def assert_rest_untouched(self, case: str) -> None:
        self.cache[self.places()] = torch.nan
        assert self.cache.isnan().all(), f"{case}: the cache changed elsewhere"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qk_norm_rope_write(shape: Shape, dtype: torch.dtype, with_norm: bool) -> None:
    for tokens in TOKENS:
        step = Case(shape, tokens, dtype, with_norm)
        before, expected = step.qkv.clone(), step.expected()
        step.run(overlap=tokens % 2 == 0)
        case, heads, kv_heads = f"{tokens} tokens", shape.num_heads, shape.kv_heads
        assert_close(step.qkv[:, :heads], expected[:, :heads], f"{case}: queries")
        assert torch.equal(step.qkv[:, heads:], before[:, heads:]), f"{case}: qkv changed"
        keys, values = step.cache[step.places()].split(kv_heads, dim=1)
        assert_close(keys, expected[:, heads : heads + kv_heads], f"{case}: keys")
        assert torch.equal(values, before[:, heads + kv_heads :]), f"{case}: values"
        step.assert_rest_untouched(case)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=str)
def test_padding_writes_to_slot_0_alone(shape: Shape) -> None:
    step = Case(shape, 40, torch.bfloat16, with_norm=True)
    step.positions[20:], step.slots[20:] = 0, 0
    step.qkv[20:] = torch.nan
    before, expected = step.qkv.clone(), step.expected()
    step.run()
    heads, kv_heads = step.shape.num_heads, step.shape.kv_heads
    assert_close(step.qkv[:20, :heads], expected[:20, :heads], "queries")
    assert torch.equal(step.cache[step.places()][:20, kv_heads:], before[:20, heads + kv_heads :])
    assert_close(
        step.cache[step.places()][:20, :kv_heads], expected[:20, heads : heads + kv_heads], "keys"
    )
    step.assert_rest_untouched("padding")


def test_a_token_alone_gives_the_same_bits_as_among_others() -> None:
    many = Case(SHAPES[1], 1000, torch.bfloat16, with_norm=True)
    queries = many.qkv[617:618].clone()
    positions, slots = many.positions[617:618], many.slots[617:618]
    alone = torch.full_like(many.cache, torch.nan)
    heads = many.shape.num_heads
    qk_norm_rope_write(queries, *many.norms, many.table, positions, slots, alone, heads, EPSILON)
    many.run()
    assert torch.equal(queries[:, :heads], many.qkv[617:618, :heads])
    block, offset = divmod(int(slots.item()), many.shape.block_size)
    assert torch.equal(alone[block, :, offset], many.cache[block, :, offset])


def test_table() -> None:
    inverse = frequencies(128)
    table = rope_table(inverse, 5000, 0.5)
    positions = torch.arange(5000, device=DEVICE)
    angles = reference.rope_angles(positions, inverse, torch.float32, 0.5)
    assert torch.allclose(table[..., 0], angles.cos[:, 0, 0], atol=1e-6)
    assert torch.allclose(table[..., 1], angles.sin[:, 0, 1], atol=1e-6)
    with pytest.raises(ValueError, match="inverse_frequencies"):
        rope_table(inverse.double(), 10, 1.0)


def test_what_does_not_fit_is_refused() -> None:
    step = Case(SHAPES[0], 4, torch.bfloat16, with_norm=True)
    (q_norm, k_norm), heads = step.norms, step.shape.num_heads
    rest = (step.table, step.positions, step.slots)
    with pytest.raises(ValueError, match="together"):
        qk_norm_rope_write(step.qkv, q_norm, None, *rest, step.cache, heads, EPSILON)
    with pytest.raises(ValueError, match="heads"):
        qk_norm_rope_write(step.qkv, q_norm, k_norm, *rest, step.cache, heads - 1, EPSILON)
    with pytest.raises(ValueError, match="cache"):
        qk_norm_rope_write(step.qkv, q_norm, k_norm, *rest, step.cache.half(), heads, EPSILON)
    wide = step.table, step.positions, step.slots.long()
    with pytest.raises(ValueError, match="slots"):
        qk_norm_rope_write(step.qkv, q_norm, k_norm, *wide, step.cache, heads, EPSILON)
    apart = step.qkv.repeat(1, 1, 2)[..., :128]
    with pytest.raises(ValueError, match="qkv"):
        qk_norm_rope_write(apart, q_norm, k_norm, *rest, step.cache, heads, EPSILON)
