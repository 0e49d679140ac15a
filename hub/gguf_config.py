"""GGUF metadata -> config.json and generation_config.json.

Owns the list of what MILI can import: every key of the model's architecture is read or refused by
name, so that a model which computes something else is never run silently. Does not know tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mili.hub.gguf_file import GgufFile

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
READ_KEYS = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "vocab_size",
}
# Keys that change nothing at these values.
NEUTRAL_VALUES = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.type": "none",
}
SAMPLING_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def architecture_of(gguf: GgufFile) -> str:
    """Return the GGUF architecture; raise PullError if MILI cannot import it."""
    name = gguf.require("general.architecture", str)
    if name not in ARCHITECTURES:
        raise gguf.refusal(
            f"its architecture is {name!r}, and MILI knows {', '.join(ARCHITECTURES)}"
        )
    if gguf.get("split.count") not in (None, 0, 1):
        raise gguf.refusal("it is one part of a split file; merge the parts first")
    prefix = f"{name}."
    for key in gguf.keys:
        suffix = key.removeprefix(prefix)
        if suffix == key or suffix in READ_KEYS:
            continue
        value = gguf.get(key)
        if suffix not in NEUTRAL_VALUES or value != NEUTRAL_VALUES[suffix]:
            raise gguf.refusal(f"MILI does not support {key} = {value!r}")
    return name


def model_config(gguf: GgufFile, *, dtype: str, vocab_size: int, tied: bool) -> dict[str, Any]:
    """Return the contents of config.json. What the metadata do not say, the tensors do."""
    architecture = architecture_of(gguf)

    def integer(key: str, default: int | None = None) -> int:
        value = gguf.get(f"{architecture}.{key}")
        value = default if value is None else value
        if not isinstance(value, int) or value <= 0:
            raise gguf.refusal(f"{architecture}.{key} is {value!r}, not a positive integer")
        return value

    hidden_size = integer("embedding_length")
    num_heads = integer("attention.head_count")
    head_dim = integer("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if integer(key, head_dim) != head_dim:
            raise gguf.refusal(f"{architecture}.{key} is not the head size {head_dim}")
    epsilon = gguf.require(f"{architecture}.attention.layer_norm_rms_epsilon", float)
    theta = gguf.get(f"{architecture}.rope.freq_base")
    rope_theta = _shortest(theta) if isinstance(theta, float) else 10000.0
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": integer("feed_forward_length"),
        "num_hidden_layers": integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": _shortest(epsilon),
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "max_position_embeddings": integer("context_length"),
        "tie_word_embeddings": tied,
        "dtype": dtype,
        **special_token_ids(gguf),
    }


def generation_config(gguf: GgufFile) -> dict[str, Any]:
    """Return the contents of generation_config.json: where to stop, and how to sample."""
    config: dict[str, Any] = special_token_ids(gguf)
    for name, key in SAMPLING_KEYS.items():
        value = gguf.get(key)
        if value is not None:
            config[name] = _shortest(value) if isinstance(value, float) else value
    return config


def special_token_ids(gguf: GgufFile) -> dict[str, Any]:
    """Return bos, eos and pad ids, as far as the file names them."""
    ids: dict[str, Any] = {}
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        value = gguf.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None:
            ids[f"{name}_token_id"] = value
    end_of_turn = gguf.get("tokenizer.ggml.eot_token_id")
    eos = ids.get("eos_token_id", end_of_turn)
    if end_of_turn not in (None, eos):
        ids["eos_token_id"] = [eos, end_of_turn]
    return ids


def _shortest(value: float) -> float:
    """Return 1e-05 for the float32 nearest to it, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
