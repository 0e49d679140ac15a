"""A decoder's weights on one device, as its products read them.

Owns which tensors of a checkpoint there are, and which are stacked into one. Does not know what is
computed with them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mili.worker.models.config import DecoderConfig
from mili.worker.weights import WeightSource


class LayerWeights(NamedTuple):
    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(heads + 2 * kv_heads) * head_dim, hidden]
    qkv_bias: torch.Tensor | None  # [(heads + 2 * kv_heads) * head_dim]
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None  # [head_dim]
    output: torch.Tensor  # [hidden, heads * head_dim]
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * intermediate, hidden]
    down: torch.Tensor  # [hidden, intermediate]


class DecoderWeights(NamedTuple):
    embedding: torch.Tensor  # [vocab_size, hidden]
    layers: list[LayerWeights]
    norm: torch.Tensor  # [hidden]
    head: torch.Tensor  # [vocab_size, hidden]: the embedding itself where they are tied


def take_weights(
    config: DecoderConfig,
    source: WeightSource,
    frequencies: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> DecoderWeights:
    """Take everything that the source has. Raises ValueError where it is not this decoder's.

    frequencies: RoPE's, [head_dim / 2], which old checkpoints repeat in every layer.
    """
    table = (config.vocab_size, config.hidden_size)
    embedding = source.take("model.embed_tokens.weight", *table)
    layers = [
        _take_layer(config, source, f"model.layers.{index}.", frequencies, dtype, device)
        for index in range(config.num_layers)
    ]
    norm = source.take("model.norm.weight", config.hidden_size)
    if config.tie_word_embeddings:
        head = embedding
        source.take_derived("lm_head.weight", head, "model.embed_tokens.weight")
    else:
        head = source.take("lm_head.weight", *table)
    source.finish()
    return DecoderWeights(embedding, layers, norm, head)


def _take_layer(
    config: DecoderConfig,
    source: WeightSource,
    prefix: str,
    frequencies: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> LayerWeights:
    hidden, size = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def take(name: str, *shape: int) -> torch.Tensor:
        return source.take(prefix + name, *shape)

    def stack(names: dict[str, int], *columns: int) -> torch.Tensor:
        stacked = torch.empty(sum(names.values()), *columns, dtype=dtype, device=device)
        first = 0
        for name, rows in names.items():
            source.take_into(stacked[first : first + rows], prefix + name)
            first += rows
        return stacked

    projections = {"q": q_size, "k": kv_size, "v": kv_size}
    biases = {f"self_attn.{name}_proj.bias": rows for name, rows in projections.items()}
    weights = {f"self_attn.{name}_proj.weight": rows for name, rows in projections.items()}
    source.take_derived(
        f"{prefix}self_attn.rotary_emb.inv_freq", frequencies, "config.json's rope_theta"
    )
    normed = config.has_qk_norm
    return LayerWeights(
        input_norm=take("input_layernorm.weight", hidden),
        qkv=stack(weights, hidden),
        qkv_bias=stack(biases) if config.has_qkv_bias else None,
        q_norm=take("self_attn.q_norm.weight", config.head_dim) if normed else None,
        k_norm=take("self_attn.k_norm.weight", config.head_dim) if normed else None,
        output=take("self_attn.o_proj.weight", hidden, q_size),
        mlp_norm=take("post_attention_layernorm.weight", hidden),
        gate_up=stack({"mlp.gate_proj.weight": size, "mlp.up_proj.weight": size}, hidden),
        down=take("mlp.down_proj.weight", hidden, size),
    )
