"""The published Qwen3 shapes, and what is known of their speed on one H100 80GB.

Owns config.json as transformers has it, the floors, and the figures to compare with. Does not
measure anything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tests.model_folders import make_model_folder, write_tokenizer

# Measured on the card: bytes and operations per second. Nothing is faster.
BANDWIDTH = 3.0e12
ARITHMETIC = 798e12
_VOCAB_SIZE = 151_936
# The published tokenizer's.
_NUM_MERGES = 151_387
_HEAD_DIM = 128
_SCALAR_BYTES = 2


class Workload(NamedTuple):
    """Lengths in tokens. steps: decode steps between the two ends of "step"."""

    prompt: int = 512
    steps: int = 128
    many: int = 2048
    long: int = 32_768

    @property
    def context(self) -> int:
        """What a sequence has on average while it decodes."""
        return self.prompt + self.steps // 2


class Known(NamedTuple):
    """Seconds: vLLM 0.26.0 on the same card, and what the first GPU worker had to reach."""

    vllm: float | None = None
    entry: float | None = None


class Model(NamedTuple):
    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    known: dict[str, Known]
    workload: Workload = Workload()
    vocab_size: int = _VOCAB_SIZE

    @property
    def layer_weights(self) -> int:
        """Numbers in the projections of all layers."""
        attention = (2 * self.heads + 2 * self.kv_heads) * _HEAD_DIM * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def decode_floor(self, batch: int) -> float:
        """Seconds to read the weights once, and each sequence's keys and values."""
        weights = self.layer_weights + self.vocab_size * self.hidden
        per_token = self.layers * 2 * self.kv_heads * _HEAD_DIM
        numbers = weights + batch * self.workload.context * per_token
        return numbers * _SCALAR_BYTES / BANDWIDTH

    def prefill_floor(self, prompts: int, length: int) -> float:
        """Seconds for the products of all tokens, causal attention, and the last tokens' logits."""
        products = 2 * self.layer_weights * prompts * length
        attention = 2 * self.layers * self.heads * _HEAD_DIM * length**2 * prompts
        head = 2 * self.vocab_size * self.hidden * prompts
        return (products + attention + head) / ARITHMETIC

    def config(self) -> dict[str, Any]:
        """The published config.json."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "head_dim": _HEAD_DIM,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 40960,
            "max_window_layers": self.layers,
            "model_type": "qwen3",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
        }


# By the names of bench_engine's rows. The start is vLLM's best of "69 to 228 s".
_MODELS = (
    Model(
        "qwen3-0.6b", 1024, 3072, 28, 16, 8, True,
        {
            "step, batch 1": Known(1.99e-3, 1.3e-3),
            "step, batch 8": Known(1.96e-3, 1.5e-3),
            "step, batch 64": Known(3.49e-3, 3.3e-3),
            "step, batch 256": Known(8.45e-3, 8.4e-3),
            "one 512-token prompt": Known(12.8e-3, 6e-3),
            "16 prompts of 2048": Known(101e-3, 16 * 2048 / 300e3),
            "one prompt of 32768": Known(278e-3, 420e-3),
            "start to first token": Known(69.0, 20.0),
        },
    ),
    Model(
        "qwen3-1.7b", 2048, 6144, 28, 16, 8, True,
        {
            "step, batch 1": Known(2.38e-3),
            "step, batch 64": Known(4.11e-3),
            "start to first token": Known(69.0),
        },
    ),
    Model(
        "qwen3-8b", 4096, 12288, 36, 32, 8, False,
        {
            "step, batch 1": Known(6.77e-3, 6.3e-3),
            "step, batch 8": Known(7.19e-3, 6.8e-3),
            "step, batch 64": Known(9.18e-3, 9.0e-3),
            "step, batch 256": Known(16.8e-3, 16.8e-3),
            "one 512-token prompt": Known(16.7e-3, 14e-3),
            "16 prompts of 2048": Known(764e-3, 16 * 2048 / 40e3),
            "one prompt of 32768": Known(1.234, 1.5),
            "start to first token": Known(69.0, 25.0),
        },
    ),
    # For trying the benchmark itself, on a CPU.
    Model(
        "tiny", 64, 128, 2, 2, 1, True, {},
        workload=Workload(prompt=20, steps=40, many=64, long=600), vocab_size=1000,
    ),
)  # fmt: skip
MODELS = {model.name: model for model in _MODELS}


def write_folder(path: Path, model: Model) -> tuple[str, ...]:
    """Make a folder of the model; returns the flags with which `mili serve` takes it."""
    if model.name == "tiny":
        make_model_folder(
            path,
            hidden_size=model.hidden,
            intermediate_size=model.intermediate,
            layers=model.layers,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=_HEAD_DIM,
            vocab_size=model.vocab_size,
        )
        return ()
    path.mkdir()
    (path / "config.json").write_text(json.dumps(model.config(), indent=2))
    write_tokenizer(path, num_merges=_NUM_MERGES)
    return ("--load-format", "random")
