"""Rows that are held to a grammar, on the GPU: whole steps, several in flight."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("cupy")

import torch

from tests.gpu.steps import SETTINGS
from tests.held_rows import check_held_rows
from tests.model_folders import make_model_folder
from tests.step_driver import StepDriver

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_held_rows_fit_and_free_rows_are_unchanged(tmp_path: Path, depth: int, eager: bool) -> None:
    folder = make_model_folder(
        tmp_path,
        hidden_size=512,
        intermediate_size=1024,
        heads=8,
        kv_heads=2,
        vocab_size=2048,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )
    driver = StepDriver(folder, **SETTINGS, enforce_eager=eager)
    driver.runner.warm_up()
    check_held_rows(driver, depth)
