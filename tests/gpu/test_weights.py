"""Weights on the GPU: the bits of the CPU's, through pinned memory; random ones, fast."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mili.worker.random_weights import RandomCheckpoint
from mili.worker.weights import Checkpoint

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gpu_has_what_the_cpu_has(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    """More chunks than the ring has, stacked rows beside poison, on a stream of its own."""
    path = tmp_path / "w.safetensors"
    large = torch.randn(20_000, 2048).to(stored)
    save_file({"large": large, "small": torch.randn(2048).to(stored)}, path)
    with Checkpoint([path], dtype) as checkpoint:
        expected = [checkpoint.take("large", 20_000, 2048), checkpoint.take("small", 2048)]
    with torch.cuda.stream(torch.cuda.Stream()), Checkpoint([path], dtype, GPU) as checkpoint:
        stacked = torch.full((2, 20_000, 2048), torch.nan, dtype=dtype, device=GPU)
        checkpoint.take_into(stacked[1], "large")
        # Whatever follows on the stream has the values, though the host has not waited.
        sums = stacked[1].float().sum(dim=1)
        woven = torch.zeros(20_000, 2, 2048, dtype=dtype, device=GPU)
        checkpoint.take_into(woven[:, 1], "large")
        small = checkpoint.take("small", 2048)
        checkpoint.take_derived("small", expected[1], "itself")
        checkpoint.finish()
    assert torch.equal(stacked[1].cpu(), expected[0])
    assert stacked[0].isnan().all()
    assert torch.equal(sums, stacked[1].float().sum(dim=1))
    assert torch.equal(woven[:, 1].cpu(), expected[0])
    assert torch.equal(small.cpu(), expected[1])


def test_random_weights_are_drawn_in_any_order_and_fast() -> None:
    first, second = (RandomCheckpoint(torch.bfloat16, GPU, tied=False) for _ in range(2))
    names = [f"model.layers.{index}.mlp.down_proj.weight" for index in range(8)]
    drawn = {name: first.take(name, 4096, 12_288) for name in names}
    first.finish()
    started = time.perf_counter()
    for name in reversed(names):
        assert torch.equal(second.take(name, 4096, 12_288), drawn[name])
    woven = torch.empty(4096, 2, 12_288, dtype=torch.bfloat16, device=GPU)
    second.take_into(woven[:, 1], names[0])
    assert torch.equal(woven[:, 1], drawn[names[0]])
    second.finish()
    rate = second.num_bytes / (time.perf_counter() - started)
    assert rate > 8e9, f"{rate / 1e9:.1f} GB/s, comparison included"
    spread = drawn[names[0]].float().std().item()
    assert spread == pytest.approx(2 / 12_288**0.5, rel=0.02)
