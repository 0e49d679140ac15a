"""silu_and_mul against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cupy")

from mili.kernels import reference
from mili.kernels.activation import silu_and_mul
from tests.gpu.compare import assert_close

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16)
SIZES = (8, 1536, 3072, 6144, 12288)
TOKENS = (1, 2, 3, 17, 256, 1000, 8192)
SMALL = pytest.param(1536, torch.bfloat16, (1, 17), marks=pytest.mark.sanitize)
CASES = [SMALL, *((size, dtype, TOKENS) for size in SIZES for dtype in DTYPES)]


@pytest.mark.parametrize(("size", "dtype", "token_counts"), CASES)
def test_silu_and_mul(size: int, dtype: torch.dtype, token_counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for tokens in token_counts:
        gate_up = (torch.randn(tokens, 2 * size, device=DEVICE) * 3).to(dtype)
        out = torch.full((tokens + 1, size), torch.nan, dtype=dtype, device=DEVICE)
        silu_and_mul(gate_up, out[:tokens], overlap=tokens % 2 == 0)
        case = f"{tokens} tokens"
        # In slices, so that float64 copies of the largest case stay small.
        for start in range(0, tokens, 1024):
            here = slice(start, min(start + 1024, tokens))
            assert_close(out[here], reference.silu_and_mul(gate_up[here].double()), case)
        assert out[tokens].isnan().all(), f"{case}: written past the end"


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(dtype: torch.dtype) -> None:
    size = 8
    large = torch.finfo(dtype).max
    gates = [0.0, -0.0, large, -large, 100.0, -100.0, torch.nan, torch.inf]
    gate_up = torch.ones(2, 2 * size, dtype=dtype, device=DEVICE)
    gate_up[0, :size] = torch.tensor(gates, dtype=dtype)
    out = torch.full((2, size), torch.nan, dtype=dtype, device=DEVICE)
    silu_and_mul(gate_up, out)
    expected = [0.0, 0.0, large, 0.0, 100.0, 0.0]
    assert torch.allclose(out[0, :6].double().cpu(), torch.tensor(expected).double(), atol=1e-6), (
        f"{out[0].tolist()}"
    )
    assert out[0, 6].isnan() and out[0, 7] == torch.inf
    assert out[1].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    gate_up = torch.zeros(4, 128, dtype=torch.bfloat16, device=DEVICE)
    out = torch.zeros(4, 64, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match="gate_up"):
        silu_and_mul(gate_up[:, :64], out)
    with pytest.raises(ValueError, match="gate_up"):
        silu_and_mul(gate_up.half(), out)
    with pytest.raises(ValueError, match="contiguous"):
        silu_and_mul(gate_up, torch.zeros(64, 4, dtype=torch.bfloat16, device=DEVICE).T)
    with pytest.raises(ValueError, match="multiple of 8"):
        silu_and_mul(gate_up[:, :24].contiguous(), out[:, :12].contiguous())
