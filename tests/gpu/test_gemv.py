"""The projections of few rows against float64, and chains of them with overlap."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cupy")

from mili.kernels import reference
from mili.kernels.gemv import VECTOR_ROWS, gemv, gemv_logits, gemv_swiglu, max_rows, source
from mili.kernels.module import load_all
from mili.kernels.rope import qk_norm_rope_write, rope_table
from tests.gpu.compare import assert_close

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
BF16, FP16 = torch.bfloat16, torch.float16
EPSILON = 1e-6
# (n, k): projections of the models, and sizes that nothing divides.
SHAPES = (
    (960, 576),
    (576, 1536),
    (4096, 1024),
    (1024, 2048),
    (1024, 3072),
    (6144, 4096),
    (4096, 12288),
    (1001, 2048),
    (17, 1024),
    (9, 8),
    (33, 264),
    (4099, 2056),
)
CASES = [
    (n, k, rows, dtype)
    for dtype, shapes in ((BF16, SHAPES), (FP16, SHAPES[:4]))
    for n, k in shapes
    for rows in (1, 2, 3, 5, 8)
    if rows <= max_rows(dtype, k)
]


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def poisoned(rows: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """One row more than a kernel may write."""
    return torch.full((rows + 1, n), torch.nan, dtype=dtype, device=DEVICE)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In float64."""
    return x.double() @ weight.double().T


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rounded, as the kernels keep it."""
    return reference.rms_norm(x.double(), weight.double(), EPSILON).to(x.dtype).double()


def assert_written(out: torch.Tensor, expected: torch.Tensor, case: str) -> None:
    """out: one row more than expected, which must still be poisoned."""
    assert_close(out[:-1], expected, case)
    assert out[-1].isnan().all(), f"{case}: written past the end"


@pytest.fixture(scope="module")
def compiled() -> None:
    """All at once, on all cores."""
    load_all(
        source(dtype, rows=rows, n=n, k=k, gated=gated)
        for n, k, rows, dtype in CASES
        for gated in (False, True)
    )


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def check_gemv(n: int, k: int, rows: int, dtype: torch.dtype) -> None:
    x = random(rows + 1, k, dtype=dtype, scale=2)[1:]
    weight = random(n, k, dtype=dtype, scale=k**-0.5)
    norm_weight, bias = random(k, dtype=dtype), random(n, dtype=dtype)
    plain, with_norm = product(x, weight), normed(x, norm_weight) @ weight.double().T

    out = poisoned(rows, n, dtype)
    gemv(x, weight, out[:rows])
    assert_written(out, plain, "plain")

    out = poisoned(rows, n, dtype)
    gemv(x, weight, out[:rows], norm_weight=norm_weight, epsilon=EPSILON, overlap=True)
    assert_written(out, with_norm, "norm")

    residual = random(rows, n, dtype=dtype)
    out = poisoned(rows, n, dtype)
    gemv(x, weight, out[:rows], bias=bias, residual=residual)
    assert_written(out, plain + bias.double() + residual.double(), "bias and residual")

    out = poisoned(rows, n, dtype)
    out[:rows] = residual
    gemv(x, weight, out[:rows], residual=out[:rows], overlap=True)
    assert_written(out, plain + residual.double(), "residual in place")

    out = poisoned(rows, n, dtype)
    more = {"norm_weight": norm_weight, "epsilon": EPSILON, "bias": bias, "residual": residual}
    gemv(x, weight, out[:rows], **more)
    assert_written(out, with_norm + bias.double() + residual.double(), "norm, bias and residual")

    if rows <= VECTOR_ROWS:
        logits = poisoned(rows, n, torch.float32)
        gemv_logits(x, weight, logits[:rows])
        assert_written(logits, plain, "logits")


def check_gemv_swiglu(n: int, k: int, rows: int, dtype: torch.dtype) -> None:
    x, norm_weight = random(rows, k, dtype=dtype, scale=2), random(k, dtype=dtype)
    weight = random(2 * n, k, dtype=dtype, scale=k**-0.5)
    out = poisoned(rows, n, dtype)
    gemv_swiglu(x, weight, out[:rows], norm_weight=norm_weight, epsilon=EPSILON)
    expected = reference.silu_and_mul(normed(x, norm_weight) @ weight.double().T)
    assert_written(out, expected, "swiglu")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("n", "k", "rows", "dtype"), CASES)
def test_gemv(n: int, k: int, rows: int, dtype: torch.dtype) -> None:
    check_gemv(n, k, rows, dtype)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("n", "k", "rows", "dtype"), CASES)
def test_gemv_swiglu(n: int, k: int, rows: int, dtype: torch.dtype) -> None:
    check_gemv_swiglu(n, k, rows, dtype)


@pytest.mark.sanitize
@pytest.mark.parametrize(("n", "k", "rows"), [(33, 264, 2), (17, 1024, 1), (17, 96, 5)])
def test_a_small_product(n: int, k: int, rows: int) -> None:
    """One warp a row of the weight, and several; on tensor cores, some warps without work."""
    check_gemv(n, k, rows, BF16)
    check_gemv_swiglu(n, k, rows, BF16)


def test_one_output() -> None:
    x, weight = random(3, 1024, dtype=BF16), random(2, 1024, dtype=BF16, scale=1 / 32)
    norm_weight = random(1024, dtype=BF16)
    logits = poisoned(2, 1, torch.float32)
    gemv_logits(x[:2], weight[:1], logits[:2])
    assert torch.allclose(logits[:2].double(), product(x[:2], weight[:1]), atol=1e-4)
    assert logits[2].isnan().all()
    for rows in (2, 3):
        out = poisoned(rows, 1, BF16)
        gemv_swiglu(x[:rows], weight, out[:rows], norm_weight=norm_weight, epsilon=EPSILON)
        expected = reference.silu_and_mul(normed(x[:rows], norm_weight) @ weight.double().T)
        assert torch.allclose(out[:rows].double(), expected, atol=2e-2)
        assert out[rows].isnan().all()


@pytest.mark.parametrize(("vocab", "k"), [(151936, 1024), (49152, 576)])
def test_head(vocab: int, k: int) -> None:
    x, weight = random(2, k, dtype=BF16), random(vocab, k, dtype=BF16, scale=k**-0.5)
    logits = poisoned(2, vocab, torch.float32)
    gemv_logits(x, weight, logits[:2])
    assert_written(logits, product(x, weight), "logits")


@pytest.mark.parametrize("rows", [2, 7])
def test_a_row_with_nan_spoils_no_other(rows: int) -> None:
    x, weight = random(rows, 1024, dtype=BF16), random(512, 1024, dtype=BF16)
    norm_weight = random(1024, dtype=BF16)
    clean, out = poisoned(rows - 1, 512, BF16), poisoned(rows - 1, 512, BF16)
    gemv(x, weight, clean, norm_weight=norm_weight, epsilon=EPSILON)
    x[0] = torch.nan
    gemv(x, weight, out, norm_weight=norm_weight, epsilon=EPSILON)
    assert out[0].isnan().all()
    assert torch.equal(out[1:], clean[1:])


class Chain:
    """A decoder's layers without their attention, every kernel dependent on the one before."""

    def __init__(self, rows: int, hidden: int, intermediate: int, layers: int) -> None:
        self.heads, self.kv_heads, head_dim = hidden // 128, 1, 128
        all_heads = self.heads + 2 * self.kv_heads
        qkv_size = all_heads * head_dim

        def weight(n: int, k: int) -> torch.Tensor:
            return random(n, k, dtype=BF16, scale=k**-0.5)

        self.layers = [
            (
                weight(qkv_size, hidden),
                weight(hidden, qkv_size),
                weight(2 * intermediate, hidden),
                weight(hidden, intermediate),
            )
            for _ in range(layers)
        ]
        self.norm = 1 + random(hidden, dtype=BF16, scale=0.1)
        self.head_norm = 1 + random(head_dim, dtype=BF16, scale=0.1)
        self.start, self.x = random(rows, hidden, dtype=BF16), poisoned(rows - 1, hidden, BF16)
        self.qkv = poisoned(rows - 1, qkv_size, BF16).view(rows, all_heads, head_dim)
        self.activated = poisoned(rows - 1, intermediate, BF16)
        self.head = weight(5000, hidden)
        self.logits = poisoned(min(rows, VECTOR_ROWS) - 1, 5000, torch.float32)
        exponents = torch.arange(0, head_dim, 2, device=DEVICE) / head_dim
        self.table = rope_table(1.0 / 1e4**exponents, 100, 1.0)
        self.positions = torch.arange(rows, dtype=torch.int32, device=DEVICE) + 17
        self.slots = torch.arange(rows, dtype=torch.int32, device=DEVICE) + 16
        self.cache = torch.zeros(2, 2 * self.kv_heads, 16, head_dim, dtype=BF16, device=DEVICE)

    def run(self, overlap: bool) -> None:
        self.x.copy_(self.start)
        flat = self.qkv.flatten(1)
        norm = {"norm_weight": self.norm, "epsilon": EPSILON}
        for index, (qkv, output, gate_up, down) in enumerate(self.layers):
            # The first follows a copy, not a kernel.
            gemv(self.x, qkv, flat, **norm, overlap=overlap and index > 0)
            qk_norm_rope_write(
                self.qkv,
                self.head_norm,
                self.head_norm,
                self.table,
                self.positions,
                self.slots,
                self.cache,
                self.heads,
                EPSILON,
                overlap=overlap,
            )
            gemv(flat, output, self.x, residual=self.x, overlap=overlap)
            gemv_swiglu(self.x, gate_up, self.activated, **norm, overlap=overlap)
            gemv(self.activated, down, self.x, residual=self.x, overlap=overlap)
        gemv_logits(self.x[:VECTOR_ROWS], self.head, self.logits, overlap=overlap)


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize(("hidden", "intermediate"), [(1024, 3072), (4096, 12288), (128, 256)])
def test_overlap_changes_no_bit(rows: int, hidden: int, intermediate: int) -> None:
    chain = Chain(rows, hidden, intermediate, layers=12 if hidden < 4096 else 4)
    chain.run(overlap=False)
    x, logits = chain.x.clone(), chain.logits.clone()
    assert x.isfinite().all() and logits.isfinite().all() and logits.std() > 0.1
    torch.cuda.synchronize()
    for overlap in (False, True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(4):
                chain.run(overlap)
        for replay in range(20):
            chain.x.fill_(torch.nan)
            chain.logits.fill_(torch.nan)
            graph.replay()
            case = f"overlap {overlap}, replay {replay}"
            assert torch.equal(chain.x, x), f"{case}: {(chain.x != x).sum()} of x differ"
            differing = (chain.logits != logits).sum()
            assert torch.equal(chain.logits, logits), f"{case}: {differing} logits differ"


def test_what_does_not_fit_is_refused() -> None:
    x, weight, out = (random(*shape, dtype=BF16) for shape in ((2, 64), (96, 64), (2, 96)))
    norm = random(64, dtype=BF16)
    with pytest.raises(ValueError, match="weight"):
        gemv(x, weight[:, :32].contiguous(), out)
    with pytest.raises(ValueError, match="weight"):
        gemv(x, weight.half(), out)
    with pytest.raises(ValueError, match="out must not be x"):
        gemv(x, weight[:64], x, norm_weight=norm, epsilon=EPSILON)
    with pytest.raises(ValueError, match="out"):
        gemv(x, weight, out.float())
    with pytest.raises(ValueError, match="bias"):
        gemv(x, weight, out, bias=norm)
    with pytest.raises(ValueError, match="residual"):
        gemv(x, weight, out, residual=x)
    with pytest.raises(ValueError, match="out"):
        gemv_logits(x, weight, out)
    with pytest.raises(ValueError, match="out"):
        gemv_swiglu(x, weight, out, norm_weight=norm, epsilon=EPSILON)
    with pytest.raises(ValueError, match="rows"):
        gemv(random(9, 64, dtype=BF16), weight, random(9, 96, dtype=BF16))
    with pytest.raises(ValueError, match="aligned"):
        gemv(x, random(96 * 64 + 1, dtype=BF16)[1:].view(96, 64), out)
