"""Where a model does not fit the GPU, the operator is told what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cupy")

import torch

from mili.hub.folder import read_model_folder
from mili.worker.config import WorkerConfig
from mili.worker.main import load_runner
from tests.model_folders import make_model_folder

pytestmark = pytest.mark.gpu


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model_folder(tmp_path / "model", dtype=torch.bfloat16)


def load(folder: Path, **settings: Any) -> Any:  # noqa: ANN401
    config = WorkerConfig(model=str(folder), device="cuda", **settings)
    return load_runner(read_model_folder(folder), config)


def test_no_room_for_the_kv_cache(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no room for the KV cache: .*gpu-memory-utilization"):
        load(folder, gpu_memory_utilization=0.001)


def test_out_of_memory_while_loading(folder: Path) -> None:
    try:
        with pytest.raises(ValueError, match=r"out of memory on .*--max-num-batched-tokens"):
            load(folder, max_num_batched_tokens=200_000_000)
    finally:
        torch.cuda.empty_cache()


def test_the_cache_takes_what_is_left(folder: Path) -> None:
    free, total = torch.cuda.mem_get_info()
    runner = load(folder, gpu_memory_utilization=0.5, max_num_batched_tokens=256)
    ready = runner.ready()
    taken = ready.num_blocks * runner.cache[:, 0].nbytes
    left_free = torch.cuda.mem_get_info()[0]
    assert left_free >= 0.5 * total - (total - free)
    assert taken > 0.35 * total
    del runner
    torch.cuda.empty_cache()
