"""Weights: every tensor consumed, in the right shape, or an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mili.hub.errors import ModelFolderError
from mili.hub.folder import read_model_folder
from mili.worker.models.config import read_decoder_config
from mili.worker.models.decoder import Decoder
from mili.worker.models.rope import inverse_frequencies
from mili.worker.weights import Checkpoint
from tests.model_folders import Family, make_model_folder

Weights = dict[str, torch.Tensor]


def load(path: Path) -> Checkpoint:
    folder = read_model_folder(path)
    checkpoint = Checkpoint(folder.weight_files, torch.float32)
    Decoder(read_decoder_config(folder.config), checkpoint)
    return checkpoint


def rewrite(path: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tie", [True, False])
def test_every_tensor_is_consumed(tmp_path: Path, family: Family, tie: bool) -> None:
    checkpoint = load(make_model_folder(tmp_path, family, tie=tie))
    weights = load_file(tmp_path / "model.safetensors")
    assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in weights.values())


def test_an_index_over_several_files(tmp_path: Path) -> None:
    make_model_folder(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    load(tmp_path)


def test_derived_tensors_are_allowed_when_equal(tmp_path: Path) -> None:
    make_model_folder(tmp_path, "llama")

    def add(weights: Weights) -> None:
        rope = read_decoder_config(read_model_folder(tmp_path).config).rope
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        name = "model.layers.1.self_attn.rotary_emb.inv_freq"
        weights[name] = inverse_frequencies(rope, 64)

    rewrite(tmp_path, add)
    load(tmp_path)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(NORM), f"no {NORM}"),
        (lambda w: w.update({NORM: torch.ones(65)}), rf"{NORM} in .*shape \[65\].*\[64\]"),
        (lambda w: w.update({NORM: torch.ones(64, dtype=torch.int8)}), f"{NORM} in .* is I8"),
        (lambda w: w.update({"extra.weight": torch.ones(1)}), "1 tensors .*: extra.weight"),
        (
            lambda w: w.update({f"extra.{i}": torch.ones(1) for i in range(10)}),
            "10 tensors .*extra.7 and 2 more",
        ),
        (
            lambda w: w.update({"lm_head.weight": torch.ones(320, 64)}),
            "lm_head.weight in .* differs from model.embed_tokens.weight",
        ),
        (
            lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}),
            "inv_freq in .* differs from config.json's rope_theta",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[Weights], object], message: str
) -> None:
    make_model_folder(tmp_path, "llama")
    rewrite(tmp_path, change)
    with pytest.raises(ModelFolderError, match=message):
        load(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    path = make_model_folder(tmp_path) / "model.safetensors"
    with pytest.raises(ModelFolderError, match="repeats"):
        Checkpoint([path, path], torch.float32)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:50], lambda b: b"x" + b[1:]])
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = make_model_folder(tmp_path) / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelFolderError, match=r"model\.safetensors"):
        Checkpoint([path], torch.float32)
