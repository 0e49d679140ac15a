"""Rows that are held to a grammar, on the CPU."""

from __future__ import annotations

from pathlib import Path

from tests.held_rows import check_held_rows
from tests.model_folders import make_model_folder
from tests.step_driver import StepDriver


def test_held_rows_fit_and_free_rows_are_unchanged(tmp_path: Path) -> None:
    check_held_rows(StepDriver(make_model_folder(tmp_path)), depth=1)
