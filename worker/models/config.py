"""A decoder's shape, read from config.json and asserted: what MILI cannot do is refused by name.

Owns which models run. Does not read weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mili.hub.errors import ModelFolderError
from mili.worker.models.rope import Rope, read_rope

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM")
HEAD_DIMS = (64, 128)

# Keys that change what the model computes, and the values under which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "use_sliding_window": (None, False),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
}


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: Rope

    @property
    def has_qkv_bias(self) -> bool:
        return self.architecture == "Qwen2ForCausalLM"

    @property
    def has_qk_norm(self) -> bool:
        return self.architecture == "Qwen3ForCausalLM"


def read_decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the contents of a config.json. Raises ModelFolderError naming key and value."""
    architecture = _read_architecture(config)
    _refuse_unsupported(config)
    hidden_size = _positive(config, "hidden_size")
    num_heads = _positive(config, "num_attention_heads")
    num_kv_heads = _positive(config, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise ModelFolderError(
            f"num_attention_heads {num_heads} in config.json is not a multiple of "
            f"num_key_value_heads {num_kv_heads}"
        )
    # Only Qwen3 always names it; the others leave it out where it is hidden_size / heads.
    if architecture == "Qwen3ForCausalLM" or config.get("head_dim") is not None:
        head_dim = _positive(config, "head_dim")
    else:
        head_dim = hidden_size // num_heads
    if head_dim not in HEAD_DIMS:
        raise ModelFolderError(f"head_dim {head_dim} is not supported: MILI knows 64 and 128")
    return DecoderConfig(
        architecture=architecture,
        vocab_size=_positive(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive(config, "intermediate_size"),
        num_layers=_positive(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_epsilon=_read_epsilon(config),
        max_position_embeddings=_positive(config, "max_position_embeddings"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope=read_rope(config),
    )


def context_limit(shape: DecoderConfig, asked: int | None) -> int:
    """Tokens of the longest context. Raises ValueError where more is asked than the model can."""
    limit = shape.max_position_embeddings
    if asked is not None and asked > limit:
        raise ValueError(
            f"--max-model-len {asked} is more than the model's own limit of {limit} tokens"
        )
    return asked or limit


def _read_architecture(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ModelFolderError(
            f"architectures in config.json must name one architecture, not {architectures!r}"
        )
    architecture = str(architectures[0])
    if architecture not in ARCHITECTURES:
        raise ModelFolderError(
            f"architecture {architecture!r} in config.json is not supported: "
            f"MILI knows {', '.join(ARCHITECTURES)}"
        )
    return architecture


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if config.get("hidden_act") != "silu":
        raise ModelFolderError(
            f"hidden_act {config.get('hidden_act')!r} in config.json is not supported: "
            "MILI knows 'silu'"
        )
    for key, neutral in _NEUTRAL.items():
        if config.get(key) not in neutral:
            raise ModelFolderError(f"{key} {config[key]!r} in config.json is not supported")
    for kind in config.get("layer_types") or ():
        if kind != "full_attention":
            raise ModelFolderError(f"layer_types {kind!r} in config.json is not supported")


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ModelFolderError(f"{key} in config.json must be a positive integer, not {value!r}")
    return value


def _read_epsilon(config: Mapping[str, Any]) -> float:
    value = config.get("rms_norm_eps")
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ModelFolderError(f"rms_norm_eps in config.json must be positive, not {value!r}")
    return float(value)
