"""Weights: every tensor consumed, in the right shape, or an error that names it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from mili.hub.errors import ModelFolderError
from mili.hub.folder import read_model_folder
from mili.worker import tensor_reader
from mili.worker.cpu.decoder import Decoder
from mili.worker.models.config import read_decoder_config
from mili.worker.models.rope import inverse_frequencies
from mili.worker.tensor_reader import HostReader, StagedReader, TensorReader
from mili.worker.weights import Checkpoint
from tests.model_folders import Family, make_model_folder

Weights = dict[str, torch.Tensor]


def load(path: Path) -> Checkpoint:
    folder = read_model_folder(path)
    with Checkpoint(folder.weight_files, torch.float32) as checkpoint:
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


STORED = torch.randn(210, 90, generator=torch.Generator().manual_seed(0))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["host", 1, 2, 7, 500])
def reader(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TensorReader]:
    """The CPU's, and the GPU's on a CPU: rings of 1 to 500 chunks of a row and a bit."""
    monkeypatch.setattr(tensor_reader, "HOST_BYTES", 4000)
    if request.param == "host":
        yield HostReader()
        return
    monkeypatch.setattr(tensor_reader, "CHUNK_BYTES", 400)
    staged = StagedReader(torch.device("cpu"), request.param)
    yield staged
    staged.close()


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_every_value_arrives_in_its_place(
    tmp_path: Path, reader: TensorReader, stored: torch.dtype, dtype: torch.dtype
) -> None:
    """Alone, stacked, interleaved by rows, and transposed; what lies beside is left alone."""
    path = tmp_path / "values"
    path.write_bytes(bytes(3) + STORED.to(stored).view(torch.uint8).numpy().tobytes())
    expected = STORED.to(stored).to(dtype)
    whole = torch.full((630, 90), torch.nan, dtype=dtype)
    woven = torch.full((210, 2, 90), torch.nan, dtype=dtype)
    turned = torch.empty(90, 210, dtype=dtype)
    bias = torch.empty(90, dtype=dtype)
    with path.open("rb", buffering=0) as file:
        for target in (whole[210:420], woven[:, 1], turned.t(), bias):
            reader.read(file, 3, stored, target)
        reader.wait()
    assert torch.equal(whole[210:420], expected)
    assert whole.isnan().sum() == 420 * 90
    assert torch.equal(woven[:, 1], expected)
    assert woven[:, 0].isnan().all()
    assert torch.equal(turned, expected.t())
    assert torch.equal(bias, expected[0])


def test_what_was_taken_is_no_view_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"before": torch.ones(7), "w": STORED}, path)
    with Checkpoint([path], torch.float32) as checkpoint:
        stacked = torch.zeros(420, 90)
        checkpoint.take_into(stacked[210:], "w")
        taken = checkpoint.take("w", 210, 90)
        with pytest.raises(ModelFolderError, match=r"shape \[210, 90\].*\[209, 90\]"):
            checkpoint.take_into(stacked[:209], "w")
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(taken, STORED)
    assert torch.equal(stacked, torch.cat((torch.zeros(210, 90), STORED)))


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": STORED}, path)
    with Checkpoint([path], torch.float32) as checkpoint:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(ModelFolderError, match=r"w\.safetensors was cut short"):
            checkpoint.take("w", 210, 90)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_sees_a_bar_and_everyone_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    path = make_model_folder(tmp_path)
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    with capture_logs() as logs:
        checkpoint = load(path)
    assert ("loading weights" in stderr.getvalue()) is terminal
    (line,) = logs
    assert line["event"] == "weights are loaded"
    assert line["megabytes"] == round(checkpoint.num_bytes / 1e6)
    assert line["megabytes_per_second"] > 0


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:50], lambda b: b"x" + b[1:]])
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = make_model_folder(tmp_path) / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelFolderError, match=r"model\.safetensors"):
        Checkpoint([path], torch.float32)
