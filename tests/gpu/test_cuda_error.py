"""A CUDA error ends the worker, which says in its last line what it was doing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cupy")

import torch

from tests.model_folders import make_model_folder

pytestmark = pytest.mark.gpu


def test_a_cuda_error_ends_the_worker(tmp_path: Path) -> None:
    folder = make_model_folder(
        tmp_path / "model", max_position_embeddings=2048, dtype=torch.bfloat16
    )
    ended = subprocess.run(
        [sys.executable, "-m", "tests.gpu.failing_worker", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=90,
    )
    assert ended.returncode == 1, ended.stdout
    lines = [line for line in ended.stdout.splitlines() if "the worker ends" in line]
    assert len(lines) == 1, ended.stdout
    for part in ("CUDA", "rows=1", "tokens=1", "kernel=", "step="):
        assert part in lines[0], lines[0]
    assert ended.stdout.count("sent Failure") == 1
