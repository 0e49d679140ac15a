"""Random weights: the same whatever is taken first, and a model that computes with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from structlog.testing import capture_logs

from mili.hub.folder import read_model_folder
from mili.worker.cpu.decoder import Decoder
from mili.worker.models.config import read_decoder_config
from mili.worker.random_weights import RandomCheckpoint
from mili.worker.weights import open_weights
from tests.model_folders import Family, make_model_folder

CPU = torch.device("cpu")
GATE, UP = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"


def source(seed: int = 0, *, tied: bool = False) -> RandomCheckpoint:
    return RandomCheckpoint(torch.float32, CPU, tied=tied, seed=seed)


def test_name_shape_and_seed_alone_decide() -> None:
    gate, up = (source().take(name, 100, 30) for name in (GATE, UP))
    other = source()
    woven = torch.empty(100, 2, 30)
    other.take_into(woven[:, 1], UP)
    other.take_into(woven[:, 0], GATE)
    assert torch.equal(woven, torch.stack((gate, up), dim=1))
    stacked = torch.empty(200, 30)
    for part, name in zip(stacked.split(100), (GATE, UP), strict=True):
        other.take_into(part, name)
    assert torch.equal(stacked, torch.cat((gate, up)))
    assert other.num_bytes == 4 * 100 * 30 * 4
    assert not torch.equal(gate, up)
    assert not torch.equal(gate, source(seed=1).take(GATE, 100, 30))


def test_what_each_kind_of_tensor_is_drawn_from() -> None:
    norm = source().take("model.layers.3.self_attn.q_norm.weight", 128)
    assert 0.5 <= norm.min() < 0.6
    assert 1.4 < norm.max() <= 1.5
    spreads = {
        ("model.layers.0.self_attn.q_proj.bias", (4096,), False): 0.5,
        ("model.embed_tokens.weight", (1000, 64), False): 1.0,
        ("model.embed_tokens.weight", (1000, 64), True): 2 / 64**0.5,
        ("lm_head.weight", (1000, 64), False): 2 / 64**0.5,
        ("model.layers.0.mlp.down_proj.weight", (64, 1000), False): 2 / 1000**0.5,
    }
    for (name, shape, tied), spread in spreads.items():
        drawn = source(tied=tied).take(name, *shape)
        assert float(drawn.std()) == pytest.approx(spread, rel=0.05), name
        assert abs(float(drawn.mean())) < 0.1 * spread, name


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_folder_without_weight_files(tmp_path: Path, family: Family, tie: bool) -> None:
    """It loads, and a model with these weights is neither flat nor does it repeat one token."""
    path = make_model_folder(tmp_path, family, tie=tie, hidden_size=128, layers=8)
    (path / "model.safetensors").unlink()
    folder = read_model_folder(path, weights=False)
    with capture_logs() as logs, open_weights(folder, "random", torch.float32) as weights:
        Decoder(read_decoder_config(folder.config), weights)
    assert logs[-1]["event"] == "random weights are drawn"
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(path)
    )
    again = source(tied=tie)
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            parameter.copy_(again.take(name, *parameter.shape))
        logits = model(torch.arange(64)[None]).logits[0]  # [tokens, vocab_size]
    assert again.num_bytes == weights.num_bytes
    assert 1 < logits.std() < 4
    best = logits.topk(2, dim=1)
    assert len(set(best.indices[:, 0].tolist())) > 16
    assert (best.values[:, 0] - best.values[:, 1]).mean() > 0.2
