"""A decoder's layer on a GPU, in two halves: up to attention, and what each token does alone.

Owns the order of a layer's kernels, and which of them multiply: ours for few rows, cuBLAS for many.
Does not know which layers and tokens a step needs.
"""

from __future__ import annotations

import torch

from mili.kernels import gemv
from mili.kernels.activation import silu_and_mul
from mili.kernels.decode_attention import DecodeAttention
from mili.kernels.norm import rms_norm
from mili.kernels.prefill_attention import PrefillAttention
from mili.kernels.rope import qk_norm_rope_write
from mili.kernels.step import BatchTensors, SequenceTensors
from mili.worker.cuda.activations import Activations
from mili.worker.cuda.decoder_weights import LayerWeights
from mili.worker.models.config import DecoderConfig


def few_rows_limit(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Rows up to which reading weights row by row beats cuBLAS."""
    attended = config.num_heads * config.head_dim
    return gemv.max_rows(dtype, config.hidden_size, attended, config.intermediate_size)


class Layers:
    """All layers over one KV cache; both halves write into the same activations."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: list[LayerWeights],
        activations: Activations,
        cos_sin: torch.Tensor,
        cache: torch.Tensor,
        max_rows: int,
    ) -> None:
        """cos_sin: RoPE's table; cache: [layers, blocks, 2 * kv_heads, block_size, head_dim]."""
        self._weights, self._activations = weights, activations
        self._cos_sin, self._cache = cos_sin, cache
        self._num_heads, self._epsilon = config.num_heads, config.norm_epsilon
        self._few_rows_limit = few_rows_limit(config, cache.dtype)
        self._prefill = PrefillAttention(activations.qkv, cache, config.num_heads)
        self._decode = DecodeAttention(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            cache.dtype,
            cache.shape[3],
            max_rows,
        )

    def attend(
        self,
        index: int,
        batch: BatchTensors,
        table: SequenceTensors,
        num_tokens: int,
        *,
        decodes: bool,
        prefills: bool,
    ) -> torch.Tensor:
        """The first half: from `x` to what the first num_tokens tokens attended to.

        Writes their keys and values. decodes, prefills: whether rows of one new token, and of more,
        may be among them. The first layer of many tokens finds its input normed. Returns
        [num_tokens, heads * head_dim].
        """
        layer, cache = self._weights[index], self._cache[index]
        qkv = self._activations.qkv[:num_tokens]
        attended = self._activations.attended[:num_tokens]
        self._project(index, qkv.flatten(1))
        qk_norm_rope_write(
            qkv,
            layer.q_norm,
            layer.k_norm,
            self._cos_sin,
            batch.positions[:num_tokens],
            batch.slots[:num_tokens],
            cache,
            self._num_heads,
            self._epsilon,
            overlap=True,
        )
        if decodes:
            self._decode.attend(
                qkv,
                cache,
                table.block_tables,
                batch.rows,
                batch.starts,
                batch.sizes,
                batch.page_offsets,
                attended,
            )
        if prefills:
            self._prefill.attend(
                index,
                table.block_tables,
                batch.rows,
                batch.starts,
                batch.counts,
                batch.first_tokens,
                batch.sizes,
                batch.tile_offsets,
                attended,
            )
        return attended

    def _project(self, index: int, qkv: torch.Tensor) -> None:
        """qkv: [tokens, (heads + 2 * kv_heads) * head_dim]."""
        layer, tokens = self._weights[index], len(qkv)
        x, normed = self._activations.x[:tokens], self._activations.normed[:tokens]
        if tokens <= self._few_rows_limit:
            gemv.gemv(
                x,
                layer.qkv,
                qkv,
                norm_weight=layer.input_norm,
                epsilon=self._epsilon,
                bias=layer.qkv_bias,
                overlap=True,
            )
            return
        if index:
            rms_norm(x, layer.input_norm, normed, self._epsilon, overlap=True)
        if layer.qkv_bias is None:
            torch.mm(normed, layer.qkv.t(), out=qkv)
        else:
            torch.addmm(layer.qkv_bias, normed, layer.qkv.t(), out=qkv)

    def end(self, index: int, x: torch.Tensor, attended: torch.Tensor) -> None:
        """The second half: x, [tokens, hidden], becomes the layer's output.

        attended: [tokens, heads * head_dim]. Few tokens have norm, residual and SwiGLU inside the
        products.
        """
        layer, tokens = self._weights[index], len(x)
        activated = self._activations.activated[:tokens]
        if tokens <= self._few_rows_limit:
            gemv.gemv(attended, layer.output, x, residual=x, overlap=True)
            gemv.gemv_swiglu(
                x,
                layer.gate_up,
                activated,
                norm_weight=layer.mlp_norm,
                epsilon=self._epsilon,
                overlap=True,
            )
            gemv.gemv(activated, layer.down, x, residual=x, overlap=True)
            return
        normed, gate_up = self._activations.normed[:tokens], self._activations.gate_up[:tokens]
        x.addmm_(attended, layer.output.t())
        rms_norm(x, layer.mlp_norm, normed, self._epsilon, overlap=True)
        torch.mm(normed, layer.gate_up.t(), out=gate_up)
        silu_and_mul(gate_up, activated, overlap=True)
        x.addmm_(activated, layer.down.t())
