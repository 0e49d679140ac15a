"""`mili serve` of folders that cannot be served: one clear line, exit code 2, no restarts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.model_folders import make_model_folder
from tests.serving import MILI


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def rename_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["MambaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (cut_weights, "the file was cut short or damaged, pull the model again"),
        (remove_weights, "has no *.safetensors: pull the model again, or convert its weights"),
        (rename_architecture, "architecture 'MambaForCausalLM' in config.json is not supported"),
    ],
)
def test_a_spoilt_folder(tmp_path: Path, spoil: Callable[[Path], None], problem: str) -> None:
    model = make_model_folder(tmp_path / "tiny")
    spoil(model)
    ended = subprocess.run(
        [*MILI, "serve", str(model), "--port", "0", "--admin-port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert problem in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "restart" not in ended.stderr
