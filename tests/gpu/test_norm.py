"""RMSNorm kernels against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cupy")

from mili.kernels import reference
from mili.kernels.norm import add_rms_norm_, embed_rms_norm, final_norm, rms_norm
from tests.gpu.compare import assert_close

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16)
SIZES = (8, 576, 1024, 2048, 4096, 5120, 16384, 16392)
TOKENS = (1, 2, 3, 17, 256, 1000, 8192)
EPSILON = 1e-6
SMALL = pytest.param(576, torch.bfloat16, (1, 17), marks=pytest.mark.sanitize)
CASES = [SMALL, *((size, dtype, TOKENS) for size in SIZES for dtype in DTYPES)]
COMMON = [SMALL, *((size, dtype, TOKENS) for size in SIZES[:5] for dtype in DTYPES)]


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def poisoned(tokens: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """One token more than a kernel may write."""
    return torch.full((tokens + 1, size), torch.nan, dtype=dtype, device=DEVICE)


def expected_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return reference.rms_norm(x.double(), weight.double(), EPSILON)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("size", "dtype", "token_counts"), CASES)
def test_rms_norm(size: int, dtype: torch.dtype, token_counts: tuple[int, ...]) -> None:
    weight = random(size, dtype=dtype)
    for tokens in token_counts:
        x = random(tokens + 3, size, dtype=dtype, scale=3)[3:]
        out = poisoned(tokens, size, dtype)
        rms_norm(x, weight, out[:tokens], EPSILON, overlap=tokens % 2 == 0)
        assert_close(out[:tokens], expected_norm(x, weight), f"{tokens} tokens")
        assert out[tokens].isnan().all(), f"{tokens} tokens: written past the end"


@pytest.mark.parametrize(("size", "dtype", "token_counts"), CASES)
def test_add_rms_norm(size: int, dtype: torch.dtype, token_counts: tuple[int, ...]) -> None:
    weight = random(size, dtype=dtype)
    for tokens in token_counts:
        x, delta = random(tokens + 1, size, dtype=dtype), random(tokens, size, dtype=dtype, scale=2)
        total = x.clone()
        total[:tokens] += delta
        out = poisoned(tokens, size, dtype)
        add_rms_norm_(x[:tokens], delta, weight, out[:tokens], EPSILON)
        assert torch.equal(x, total), f"{tokens} tokens: x"
        assert_close(out[:tokens], expected_norm(total[:tokens], weight), f"{tokens} tokens")
        assert out[tokens].isnan().all(), f"{tokens} tokens: written past the end"


@pytest.mark.parametrize(("size", "dtype", "token_counts"), COMMON)
def test_embed_rms_norm(size: int, dtype: torch.dtype, token_counts: tuple[int, ...]) -> None:
    vocab = 3001
    embedding, weight = random(vocab, size, dtype=dtype), random(size, dtype=dtype)
    for tokens in token_counts:
        token_ids = torch.randint(vocab, (tokens,), dtype=torch.int32, device=DEVICE)
        token_ids[-1] = vocab - 1
        x, out = poisoned(tokens, size, dtype), poisoned(tokens, size, dtype)
        embed_rms_norm(token_ids, embedding, weight, x[:tokens], out[:tokens], EPSILON)
        assert torch.equal(x[:tokens], embedding[token_ids.long()]), f"{tokens} tokens: x"
        assert_close(out[:tokens], expected_norm(x[:tokens], weight), f"{tokens} tokens")
        past = torch.stack((x[tokens], out[tokens]))
        assert past.isnan().all(), f"{tokens} tokens: written past the end"


@pytest.mark.parametrize(("size", "dtype", "token_counts"), COMMON)
@pytest.mark.parametrize("with_delta", [True, False])
def test_final_norm(
    size: int, dtype: torch.dtype, token_counts: tuple[int, ...], with_delta: bool
) -> None:
    weight = random(size, dtype=dtype)
    for tokens in token_counts:
        padded, samples, table_rows = tokens + 5, tokens // 2 + 1, 64
        x = random(padded, size, dtype=dtype)
        x[tokens:] = torch.nan
        delta = random(padded, size, dtype=dtype) if with_delta else None
        token_rows = torch.randint(1, table_rows, (padded,), dtype=torch.int32, device=DEVICE)
        sampled = torch.randperm(tokens, device=DEVICE)[:samples]
        sample_index = torch.full((padded,), -1, dtype=torch.int32, device=DEVICE)
        sample_index[sampled] = torch.randperm(samples, device=DEVICE, dtype=torch.int32)
        sample_index[tokens:] = 0
        faulted = torch.zeros(table_rows, dtype=torch.int32, device=DEVICE)
        sizes = torch.tensor([tokens, 7, 7, 7], dtype=torch.int32, device=DEVICE)
        out = poisoned(samples, size, dtype)

        def run(
            x: torch.Tensor = x,
            delta: torch.Tensor | None = delta,
            rows: torch.Tensor = token_rows,
            index: torch.Tensor = sample_index,
            faulted: torch.Tensor = faulted,
            sizes: torch.Tensor = sizes,
            out: torch.Tensor = out,
        ) -> None:
            final_norm(x, delta, weight, EPSILON, rows, index, faulted, sizes, out)

        run()
        case = f"{tokens} tokens"
        hidden = x if delta is None else x + delta
        expected = expected_norm(hidden[sampled], weight)
        assert_close(out[sample_index[sampled].long()], expected, case)
        assert out[samples].isnan().all(), f"{case}: written past the end"
        assert not faulted.any(), f"{case}: {faulted.nonzero()} without a fault"

        bad = torch.randperm(tokens, device=DEVICE)[: min(tokens, 3)]
        for token, fault in zip(bad.tolist(), (torch.nan, torch.inf, -torch.inf), strict=False):
            x[token, torch.randint(size, ()).item()] = fault
        run()
        rows = torch.zeros_like(faulted)
        rows[token_rows[bad].long()] = 1
        assert torch.equal(faulted, rows), f"{case}: {faulted.nonzero()} are not {rows.nonzero()}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_finite_hidden_states_are_no_fault(dtype: torch.dtype) -> None:
    size = 1024
    x = torch.full((2, size), torch.finfo(dtype).max, dtype=dtype, device=DEVICE)
    index = torch.tensor([-1, 0], dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([1, 2], dtype=torch.int32, device=DEVICE)
    faulted = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    sizes = torch.tensor([2, 2, 2, 1], dtype=torch.int32, device=DEVICE)
    weight, out = random(size, dtype=dtype), poisoned(0, size, dtype)
    final_norm(x, None, weight, EPSILON, rows, index, faulted, sizes, out)
    assert faulted.tolist() == [0, 0, 0]
    # The sum of two of them, rounded as it would be stored, is infinite.
    final_norm(x, x, weight, EPSILON, rows, index, faulted, sizes, out)
    assert faulted.tolist() == [0, 1, 1]


def test_a_token_with_nan_spoils_no_other() -> None:
    dtype, size = torch.bfloat16, 1024
    x, weight = random(3, size, dtype=dtype), random(size, dtype=dtype)
    clean, out = poisoned(2, size, dtype), poisoned(2, size, dtype)
    rms_norm(x, weight, clean, EPSILON)
    x[1] = torch.nan
    rms_norm(x, weight, out, EPSILON)
    assert torch.equal(out[::2], clean[::2])
    assert out[1].isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    dtype = torch.bfloat16
    x, weight, out = (random(*shape, dtype=dtype) for shape in ((4, 64), (64,), (4, 64)))
    with pytest.raises(ValueError, match="weight"):
        rms_norm(x, weight[:32], out, EPSILON)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(x, weight.half(), out, EPSILON)
    with pytest.raises(ValueError, match="out"):
        rms_norm(x, weight, random(64, 4, dtype=dtype).T, EPSILON)
    with pytest.raises(ValueError, match="x must be"):
        rms_norm(random(4, 128, dtype=dtype)[:, :64], weight, out, EPSILON)
    small = random(2, 4, dtype=dtype)
    with pytest.raises(ValueError, match="multiple of 8"):
        rms_norm(small, small[0].clone(), small, EPSILON)
    with pytest.raises(ValueError, match="float32"):
        rms_norm(x.float(), weight.float(), out.float(), EPSILON)
    ids = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="token_ids"):
        embed_rms_norm(ids, x, weight, x.clone(), out, EPSILON)
