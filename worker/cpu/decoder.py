"""The decoder of Qwen3, Qwen2 and Llama: one forward pass over a batch of rows.

Owns the layers and their order. Does not know about requests or rows: what is where in the cache
comes with the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from mili.kernels.linear import LinearWeight, linear, linear_add, pack_linear
from mili.kernels.reference import (
    head_norm_,
    paged_attention,
    rms_norm,
    rope_,
    rope_angles,
    silu_and_mul,
    write_kv,
)
from mili.worker.cpu.batch import Batch
from mili.worker.cpu.kv_cache import KVCache
from mili.worker.models.config import DecoderConfig
from mili.worker.models.rope import attention_factor, inverse_frequencies
from mili.worker.weights import WeightSource


class _Layer(NamedTuple):
    input_norm: torch.Tensor  # [hidden]
    qkv: LinearWeight  # [(heads + 2 * kv_heads) * head_dim, hidden]
    qk_norm: torch.Tensor | None  # [heads + kv_heads, head_dim]
    output: LinearWeight  # [hidden, heads * head_dim]
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: LinearWeight  # [2 * intermediate, hidden]
    down: LinearWeight  # [hidden, intermediate]


class Decoder:
    """A model's weights, packed, and what is computed with them."""

    def __init__(self, config: DecoderConfig, source: WeightSource) -> None:
        self._config = config
        self._frequencies = inverse_frequencies(config.rope, config.head_dim)  # [head_dim / 2]
        self._attention_factor = attention_factor(config.rope)
        table = (config.vocab_size, config.hidden_size)
        self._embedding = source.take("model.embed_tokens.weight", *table)
        self._layers = [self._take_layer(source, i) for i in range(config.num_layers)]
        self._norm = source.take("model.norm.weight", config.hidden_size)
        if config.tie_word_embeddings:
            head = self._embedding
            source.take_derived("lm_head.weight", head, "model.embed_tokens.weight")
        else:
            head = source.take("lm_head.weight", *table)
        self._head = pack_linear(head)
        source.finish()

    def _take_layer(self, source: WeightSource, index: int) -> _Layer:
        config, prefix = self._config, f"model.layers.{index}."
        hidden, size = config.hidden_size, config.intermediate_size
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

        def take(name: str, *shape: int) -> torch.Tensor:
            return source.take(prefix + name, *shape)

        projections = (("q", q_size), ("k", kv_size), ("v", kv_size))
        qkv = [take(f"self_attn.{name}_proj.weight", rows, hidden) for name, rows in projections]
        qkv_bias = qk_norm = None
        if config.has_qkv_bias:
            qkv_bias = torch.cat(
                [take(f"self_attn.{name}_proj.bias", rows) for name, rows in projections]
            )
        if config.has_qk_norm:
            q_norm = take("self_attn.q_norm.weight", config.head_dim)
            k_norm = take("self_attn.k_norm.weight", config.head_dim)
            qk_norm = torch.stack([q_norm] * config.num_heads + [k_norm] * config.num_kv_heads)
        gate_up = [take(f"mlp.{name}_proj.weight", size, hidden) for name in ("gate", "up")]
        source.take_derived(
            f"{prefix}self_attn.rotary_emb.inv_freq", self._frequencies, "config.json's rope_theta"
        )
        return _Layer(
            input_norm=take("input_layernorm.weight", hidden),
            qkv=pack_linear(torch.cat(qkv), qkv_bias),
            qk_norm=qk_norm,
            output=pack_linear(take("self_attn.o_proj.weight", hidden, q_size)),
            mlp_norm=take("post_attention_layernorm.weight", hidden),
            gate_up=pack_linear(torch.cat(gate_up)),
            down=pack_linear(take("mlp.down_proj.weight", hidden, size)),
        )

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Compute the batch's tokens, store their keys and values, return their hidden states.

        The result, [tokens, hidden], is the residual stream before the last norm.
        """
        config = self._config
        dtype = self._embedding.dtype
        angles = rope_angles(batch.positions, self._frequencies, dtype, self._attention_factor)
        x = functional.embedding(batch.token_ids, self._embedding)  # [tokens, hidden]
        for layer, kv_layer in zip(self._layers, cache.layers, strict=True):
            normed = rms_norm(x, layer.input_norm, config.norm_epsilon)
            qkv = linear(normed, layer.qkv).view(len(x), -1, config.head_dim)
            queries_keys = qkv[:, : config.num_heads + config.num_kv_heads]
            if layer.qk_norm is not None:
                head_norm_(queries_keys, layer.qk_norm, config.norm_epsilon)
            rope_(queries_keys, angles)
            write_kv(qkv[:, config.num_heads :], kv_layer, batch.slots)
            queries = qkv[:, : config.num_heads]
            attended = paged_attention(queries, kv_layer, batch.attention, cache.scratch)
            x = linear_add(attended, layer.output, x)
            normed = rms_norm(x, layer.mlp_norm, config.norm_epsilon)
            x = linear_add(silu_and_mul(linear(normed, layer.gate_up)), layer.down, x)
        return x

    def final(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return hidden states [rows, hidden] after the last norm."""
        return rms_norm(hidden, self._norm, self._config.norm_epsilon)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [rows, vocab_size] float32 of hidden states [rows, hidden], two rows or more."""
        return linear(self.final(hidden), self._head).float()
