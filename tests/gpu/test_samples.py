"""The gathering of samples, and the search for faults, against plain torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cupy")

from mili.kernels import reference
from mili.kernels.samples import gather_samples

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
BF16, FP16 = torch.bfloat16, torch.float16
TABLE_ROWS = 64
# hidden, heads * head_dim
SIZES = ((576, 576), (1024, 2048), (4096, 4096), (5120, 8192), (8, 16392))
SMALL = pytest.param((576, 64), BF16, (1, 17), marks=pytest.mark.sanitize)
CASES = [SMALL, *((size, dtype, (1, 2, 17, 512, 3000)) for size in SIZES for dtype in (BF16, FP16))]


class Step:
    """Random tokens, a third of which sample; padding and everything to be written is NaN."""

    def __init__(self, tokens: int, hidden: int, attended: int, dtype: torch.dtype) -> None:
        padded, self.samples = tokens + 5, tokens // 3 + 1
        self.x = torch.randn(padded, hidden, device=DEVICE).to(dtype)
        self.attended = torch.randn(padded, attended, device=DEVICE).to(dtype)
        self.x[tokens:] = self.attended[tokens:] = torch.nan
        self.rows = torch.randint(1, TABLE_ROWS, (padded,), dtype=torch.int32, device=DEVICE)
        self.index = torch.full((padded,), -1, dtype=torch.int32, device=DEVICE)
        sampled = torch.randperm(tokens, device=DEVICE)[: self.samples]
        self.index[sampled] = torch.randperm(self.samples, device=DEVICE, dtype=torch.int32)
        self.index[tokens:] = 0
        self.sizes = torch.tensor([tokens, 7, 7, 7], dtype=torch.int32, device=DEVICE)

    def run(self, gather: object, **settings: bool) -> tuple[torch.Tensor, ...]:
        """Returns what is faulted, and what was written, with one sample more than there are."""
        faulted = torch.zeros(TABLE_ROWS, dtype=torch.int32, device=DEVICE)
        outs = [
            torch.full((self.samples + 1, each.shape[1]), torch.nan, device=DEVICE).to(each.dtype)
            for each in (self.x, self.attended)
        ]
        gather(  # type: ignore[operator]
            self.x, self.attended, self.rows, self.index, faulted, self.sizes, *outs, **settings
        )
        return faulted, *outs


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("size", "dtype", "token_counts"), CASES)
def test_gather_samples(
    size: tuple[int, int], dtype: torch.dtype, token_counts: tuple[int, ...]
) -> None:
    for tokens in token_counts:
        step, case = Step(tokens, *size, dtype), f"{tokens} tokens"
        faulted, *outs = step.run(gather_samples, overlap=tokens % 2 == 0)
        assert not faulted.any(), f"{case}: {faulted.nonzero()} without a fault"
        for out, expected in zip(outs, step.run(reference.gather_samples)[1:], strict=True):
            assert torch.equal(out[:-1], expected[:-1]), case
            assert out[-1].isnan().all(), f"{case}: written past the end"

        for token in torch.randperm(tokens)[:3].tolist():
            where = (step.x, step.attended)[token % 2][token]
            where[torch.randint(len(where), ()).item()] = (torch.nan, torch.inf)[token // 2 % 2]
        marked, expected = step.run(gather_samples)[0], step.run(reference.gather_samples)[0]
        assert marked.any() and torch.equal(marked, expected), f"{case}: {marked.nonzero()}"


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_largest_number_is_no_fault(dtype: torch.dtype) -> None:
    step = Step(3, 64, 64, dtype)
    step.x[:3], step.attended[:3] = torch.finfo(dtype).max, torch.finfo(dtype).min
    assert not step.run(gather_samples)[0].any()


def test_what_does_not_fit_is_refused() -> None:
    step = Step(4, 64, 128, BF16)
    step.rows = step.rows.long()
    with pytest.raises(ValueError, match="token_rows"):
        step.run(gather_samples)
    step = Step(4, 64, 128, BF16)
    step.attended = step.attended.half()
    with pytest.raises(ValueError, match="attended"):
        step.run(gather_samples)
    with pytest.raises(ValueError, match="multiple of 8"):
        Step(4, 64, 12, BF16).run(gather_samples)
