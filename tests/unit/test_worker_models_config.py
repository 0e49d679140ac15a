"""config.json: both layouts are read, and what MILI cannot do is refused by key and value."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mili.hub.errors import ModelFolderError
from mili.worker.models.config import read_decoder_config
from mili.worker.models.rope import (
    LinearScaling,
    Llama3Scaling,
    Rope,
    YarnScaling,
    attention_factor,
    inverse_frequencies,
)

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}


def test_an_older_config() -> None:
    config = read_decoder_config(LLAMA)
    assert config.head_dim == 64
    assert config.rope == Rope(100_000.0, None)
    assert config.tie_word_embeddings
    assert not config.has_qkv_bias
    assert not config.has_qk_norm


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "llama3"} | LLAMA3, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
        ({"type": "linear", "factor": 2}, LinearScaling(2.0)),
        (
            YARN | {"attention_factor": 1.5, "truncate": False, "beta_slow": None},
            YarnScaling(4.0, 32768, 32.0, 1.0, False, 1.5),
        ),
    ],
)
def test_both_layouts_of_rope(settings: dict[str, Any], scaling: object) -> None:
    older = LLAMA | {"rope_scaling": settings}
    newer = LLAMA | {"rope_parameters": settings | {"rope_theta": 100_000}}
    del newer["rope_theta"]
    for config in (older, newer):
        assert read_decoder_config(config).rope == Rope(100_000.0, scaling)  # type: ignore[arg-type]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_frequencies_equal_transformers(head_dim: int, kind: str) -> None:
    parameters = {"rope_type": kind, "rope_theta": 500_000.0} | LLAMA3
    oracle = transformers.LlamaConfig(head_dim=head_dim, rope_parameters=parameters)
    expected, _ = ROPE_INIT_FUNCTIONS[kind](oracle, torch.device("cpu"))
    rope = read_decoder_config(LLAMA | {"head_dim": 64, "rope_parameters": parameters}).rope
    torch.testing.assert_close(inverse_frequencies(rope, head_dim), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.2},
        {"mscale": 0.7},
        {"attention_factor": 1.25},
        {"beta_fast": 12.5, "beta_slow": 2, "truncate": False},
        {"beta_fast": 3.0, "beta_slow": 3.0, "truncate": False},
        {"factor": 1.0, "original_max_position_embeddings": 64},
    ],
)
def test_yarn_equals_transformers(head_dim: int, theta: float, change: dict[str, Any]) -> None:
    parameters = YARN | {"rope_theta": theta} | change
    oracle = transformers.Qwen3Config(head_dim=head_dim, rope_parameters=dict(parameters))
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](oracle, torch.device("cpu"))
    rope = read_decoder_config(LLAMA | {"rope_parameters": parameters}).rope
    torch.testing.assert_close(inverse_frequencies(rope, head_dim), expected, rtol=5e-7, atol=0)
    assert attention_factor(rope) == pytest.approx(factor)
    assert (factor == 1.0) is (change.get("factor") == 1.0)


def test_plain_frequencies() -> None:
    expected = [math.exp(-math.log(10_000) * i / 32) for i in range(32)]
    actual = inverse_frequencies(Rope(10_000.0, None), 64)
    torch.testing.assert_close(actual, torch.tensor(expected))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM'"),
        ({"architectures": []}, r"architectures .* \[\]"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config .*awq"),
        ({"use_sliding_window": True}, "use_sliding_window True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"head_dim": 96}, "head_dim 96"),
        ({"num_key_value_heads": 2}, "9 .* not a multiple of num_key_value_heads 2"),
        ({"num_key_value_heads": None}, "num_key_value_heads .* None"),
        ({"hidden_size": "576"}, "hidden_size .* '576'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers .* 0"),
        ({"rms_norm_eps": None}, "rms_norm_eps .* None"),
        ({"rope_theta": None}, "'rope_theta'"),
        ({"rope_theta": -1}, "rope_theta .* -1"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type 'longrope'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling.original_max_position_embeddings .* None",
        ),
        ({"rope_scaling": YARN | {"beta_fast": -1}}, "rope_scaling.beta_fast .* -1"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "rope_scaling.truncate .* 1"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor .* None"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.factor .* None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_interleaved": True}, "rope_interleaved True"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "head_dim .* None"),
    ],
)
def test_what_cannot_run_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelFolderError, match=named):
        read_decoder_config(LLAMA | change)
