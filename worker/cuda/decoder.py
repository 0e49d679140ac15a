"""The decoder of Qwen3, Qwen2 and Llama on a GPU: our kernels, and cuBLAS for large products.

Owns the weights, the activations and the order of a layer's kernels. Does not know rows or
requests, and reads no value back: everything that varies from step to step is on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mili.kernels import gemv
from mili.kernels.activation import silu_and_mul
from mili.kernels.decode_attention import DecodeAttention
from mili.kernels.norm import embed_rms_norm, final_norm, rms_norm
from mili.kernels.prefill_attention import PrefillAttention
from mili.kernels.rope import qk_norm_rope_write, rope_table
from mili.kernels.step import BatchTensors, SequenceTensors
from mili.worker.models.config import DecoderConfig
from mili.worker.models.rope import attention_factor, inverse_frequencies
from mili.worker.weights import WeightSource


class _Layer(NamedTuple):
    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(heads + 2 * kv_heads) * head_dim, hidden]
    qkv_bias: torch.Tensor | None  # [(heads + 2 * kv_heads) * head_dim]
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None  # [head_dim]
    output: torch.Tensor  # [hidden, heads * head_dim]
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * intermediate, hidden]
    down: torch.Tensor  # [hidden, intermediate]


class Activations(NamedTuple):
    """Made once, for the largest step; every graph writes into the same memory."""

    x: torch.Tensor  # [max_tokens, hidden]: the residual stream
    normed: torch.Tensor  # [max_tokens, hidden]
    qkv: torch.Tensor  # [max_tokens, heads + 2 * kv_heads, head_dim]
    attended: torch.Tensor  # [max_tokens, heads * head_dim]
    gate_up: torch.Tensor  # [max_tokens, 2 * intermediate]
    activated: torch.Tensor  # [max_tokens, intermediate]
    sampled: torch.Tensor  # [max_samples, hidden]: normed hidden states that give a token
    logits: torch.Tensor  # [max_samples, vocab_size] float32


def few_rows_limit(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Rows up to which reading weights row by row beats cuBLAS."""
    attended = config.num_heads * config.head_dim
    return gemv.max_rows(dtype, config.hidden_size, attended, config.intermediate_size)


class Decoder:
    """A model's weights on one device, and what is computed with them."""

    def __init__(
        self,
        config: DecoderConfig,
        source: WeightSource,
        *,
        max_tokens: int,
        max_samples: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._config = config
        self.dtype, self._device = dtype, device
        frequencies = inverse_frequencies(config.rope, config.head_dim)
        self._cos_sin = rope_table(
            frequencies.to(device), max_model_len, attention_factor(config.rope)
        )
        table = (config.vocab_size, config.hidden_size)
        self._embedding = source.take("model.embed_tokens.weight", *table)
        self._layers = [
            self._take_layer(source, index, frequencies) for index in range(config.num_layers)
        ]
        self._norm = source.take("model.norm.weight", config.hidden_size)
        if config.tie_word_embeddings:
            self._head = self._embedding
            source.take_derived("lm_head.weight", self._head, "model.embed_tokens.weight")
        else:
            self._head = source.take("lm_head.weight", *table)
        source.finish()
        self._few_rows_limit = few_rows_limit(config, dtype)
        self.activations = self._allocate(max_tokens, max_samples)

    def _take_layer(self, source: WeightSource, index: int, frequencies: torch.Tensor) -> _Layer:
        config, prefix = self._config, f"model.layers.{index}."
        hidden, size = config.hidden_size, config.intermediate_size
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

        def take(name: str, *shape: int) -> torch.Tensor:
            return source.take(prefix + name, *shape)

        def stack(names: dict[str, int], *columns: int) -> torch.Tensor:
            stacked = torch.empty(
                sum(names.values()), *columns, dtype=self.dtype, device=self._device
            )
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
        return _Layer(
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

    def _allocate(self, max_tokens: int, max_samples: int) -> Activations:
        config = self._config

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=self._device)

        heads = config.num_heads + 2 * config.num_kv_heads
        return Activations(
            x=empty(max_tokens, config.hidden_size),
            normed=empty(max_tokens, config.hidden_size),
            qkv=empty(max_tokens, heads, config.head_dim),
            attended=empty(max_tokens, config.num_heads * config.head_dim),
            gate_up=empty(max_tokens, 2 * config.intermediate_size),
            activated=empty(max_tokens, config.intermediate_size),
            sampled=empty(max_samples, config.hidden_size),
            logits=empty(max_samples, config.vocab_size, dtype=torch.float32),
        )

    def attach(self, cache: torch.Tensor, max_rows: int) -> None:
        """Say where keys and values are: [layers, blocks, 2 * kv_heads, block_size, head_dim]."""
        config = self._config
        self._cache = cache
        self._prefill = PrefillAttention(self.activations.qkv, cache, config.num_heads)
        self._decode = DecodeAttention(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            self.dtype,
            cache.shape[3],
            max_rows,
        )

    def forward(
        self, batch: BatchTensors, table: SequenceTensors, num_tokens: int, *, prefills: bool
    ) -> None:
        """Compute the batch's first num_tokens tokens, padding included.

        Writes their keys and values, marks rows that are not finite in table.faulted, and leaves
        the normed hidden states of the samples in `activations.sampled`. prefills: whether rows of
        more than one new token may be among them.
        """
        epsilon = self._config.norm_epsilon
        x, normed = self.activations.x[:num_tokens], self.activations.normed[:num_tokens]
        few = num_tokens <= self._few_rows_limit and not prefills
        embed_rms_norm(
            batch.token_ids[:num_tokens],
            self._embedding,
            self._layers[0].input_norm,
            x,
            normed,
            epsilon,
        )
        for index, layer in enumerate(self._layers):
            with torch.cuda.nvtx.range(f"layer {index}"):
                if few:
                    self._few_rows(index, layer, batch, table, num_tokens)
                else:
                    self._many_rows(index, layer, batch, table, num_tokens, prefills)
        final_norm(
            x,
            None,
            self._norm,
            epsilon,
            batch.token_rows[:num_tokens],
            batch.sample_index[:num_tokens],
            table.faulted,
            batch.sizes,
            self.activations.sampled,
            overlap=True,
        )

    def _few_rows(
        self,
        index: int,
        layer: _Layer,
        batch: BatchTensors,
        table: SequenceTensors,
        num_tokens: int,
    ) -> None:
        """Norms, residuals and SwiGLU inside the products: six launches a layer."""
        epsilon = self._config.norm_epsilon
        buffers = [each[:num_tokens] for each in self.activations[:6]]
        x, _, qkv, attended, _, activated = buffers
        gemv.gemv(
            x,
            layer.qkv,
            qkv.flatten(1),
            norm_weight=layer.input_norm,
            epsilon=epsilon,
            bias=layer.qkv_bias,
            overlap=True,
        )
        self._attend(index, layer, batch, table, qkv, attended, prefills=False)
        gemv.gemv(attended, layer.output, x, residual=x, overlap=True)
        gemv.gemv_swiglu(
            x,
            layer.gate_up,
            activated,
            norm_weight=layer.mlp_norm,
            epsilon=epsilon,
            overlap=True,
        )
        gemv.gemv(activated, layer.down, x, residual=x, overlap=True)

    def _many_rows(
        self,
        index: int,
        layer: _Layer,
        batch: BatchTensors,
        table: SequenceTensors,
        num_tokens: int,
        prefills: bool,
    ) -> None:
        epsilon = self._config.norm_epsilon
        buffers = [each[:num_tokens] for each in self.activations[:6]]
        x, normed, qkv, attended, gate_up, activated = buffers
        if index:
            rms_norm(x, layer.input_norm, normed, epsilon, overlap=True)
        if layer.qkv_bias is None:
            torch.mm(normed, layer.qkv.t(), out=qkv.flatten(1))
        else:
            torch.addmm(layer.qkv_bias, normed, layer.qkv.t(), out=qkv.flatten(1))
        self._attend(index, layer, batch, table, qkv, attended, prefills=prefills)
        x.addmm_(attended, layer.output.t())
        rms_norm(x, layer.mlp_norm, normed, epsilon, overlap=True)
        torch.mm(normed, layer.gate_up.t(), out=gate_up)
        silu_and_mul(gate_up, activated, overlap=True)
        x.addmm_(activated, layer.down.t())

    def _attend(
        self,
        index: int,
        layer: _Layer,
        batch: BatchTensors,
        table: SequenceTensors,
        qkv: torch.Tensor,
        attended: torch.Tensor,
        *,
        prefills: bool,
    ) -> None:
        cache = self._cache[index]
        qk_norm_rope_write(
            qkv,
            layer.q_norm,
            layer.k_norm,
            self._cos_sin,
            batch.positions[: len(qkv)],
            batch.slots[: len(qkv)],
            cache,
            self._config.num_heads,
            self._config.norm_epsilon,
            overlap=True,
        )
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

    def compute_logits(self, num_samples: int) -> torch.Tensor:
        """Logits of the first samples, padding included: [num_samples, vocab_size] float32."""
        sampled = self.activations.sampled[:num_samples]
        logits = self.activations.logits[:num_samples]
        if num_samples <= gemv.VECTOR_ROWS:
            gemv.gemv_logits(sampled, self._head, logits)
        else:
            torch.mm(sampled, self._head.t(), torch.float32, out=logits)
        return logits
