"""The decoder of Qwen3, Qwen2 and Llama on a GPU.

Owns what a step computes from token ids to logits, and for which tokens. Does not know rows or
requests, and reads no value back: everything that varies from step to step is on the device.

Of a step with prompts only the samples go on after the last layer's attention: all keys and values
are written by then, and nothing else of the other tokens is ever asked for.
"""

from __future__ import annotations

import torch

from mili.kernels import gemv
from mili.kernels.norm import embed_rms_norm, final_norm
from mili.kernels.rope import rope_table
from mili.kernels.samples import gather_samples
from mili.kernels.step import BatchTensors, SequenceTensors
from mili.worker.cuda.activations import allocate
from mili.worker.cuda.decoder_weights import take_weights
from mili.worker.cuda.layers import Layers
from mili.worker.models.config import DecoderConfig
from mili.worker.models.rope import attention_factor, inverse_frequencies
from mili.worker.weights import WeightSource


class Decoder:
    """A model on one device."""

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
        self._config, self.dtype = config, dtype
        frequencies = inverse_frequencies(config.rope, config.head_dim)
        self._cos_sin = rope_table(
            frequencies.to(device), max_model_len, attention_factor(config.rope)
        )
        self.weights = take_weights(config, source, frequencies, dtype, device)
        self.activations = allocate(config, max_tokens, max_samples, dtype, device)
        # Samples that were gathered stand in their order.
        self._sample_order = torch.arange(max_samples, dtype=torch.int32, device=device)

    def attach(self, cache: torch.Tensor, max_rows: int) -> None:
        """Say where keys and values are: [layers, blocks, 2 * kv_heads, block_size, head_dim]."""
        self._layers = Layers(
            self._config, self.weights.layers, self.activations, self._cos_sin, cache, max_rows
        )

    def decode(self, batch: BatchTensors, table: SequenceTensors, num_rows: int) -> None:
        """Compute a step of rows with one new token each, the first num_rows, padding included.

        Writes their keys and values, marks rows that are not finite in table.faulted, and leaves
        the normed hidden states of the samples in `activations.sampled`.
        """
        x = self._embed(batch, num_rows)
        for layer in range(self._config.num_layers):
            with torch.cuda.nvtx.range(f"layer {layer}"):
                attended = self._layers.attend(
                    layer, batch, table, num_rows, decodes=True, prefills=False
                )
                self._layers.end(layer, x, attended)
        final_norm(
            x,
            None,
            self.weights.norm,
            self._config.norm_epsilon,
            batch.token_rows[:num_rows],
            batch.sample_index[:num_rows],
            table.faulted,
            batch.sizes,
            self.activations.sampled,
            overlap=True,
        )

    def prefill(
        self, batch: BatchTensors, table: SequenceTensors, num_tokens: int, *, decodes: bool
    ) -> None:
        """Compute a step of any rows, its first num_tokens tokens, as far as all of them go.

        Writes their keys and values and marks rows that are not finite in table.faulted. Where
        there are samples, `finish` must follow. decodes: whether rows of one new token may be among
        the others.
        """
        x = self._embed(batch, num_tokens)
        last = self._config.num_layers - 1
        for layer in range(last + 1):
            with torch.cuda.nvtx.range(f"layer {layer}"):
                attended = self._layers.attend(
                    layer, batch, table, num_tokens, decodes=decodes, prefills=True
                )
                if layer < last:
                    self._layers.end(layer, x, attended)
        gather_samples(
            x,
            attended,
            batch.token_rows[:num_tokens],
            batch.sample_index[:num_tokens],
            table.faulted,
            batch.sizes,
            self.activations.last_x,
            self.activations.last_attended,
            overlap=True,
        )

    def finish(self, batch: BatchTensors, table: SequenceTensors, num_samples: int) -> None:
        """Compute what is left of a prefill for its first num_samples samples, padding included.

        Padding holds what other steps left there: no row of a product depends on another, and
        nobody asks for it. Marks and leaves behind what `decode` does.
        """
        x = self.activations.last_x[:num_samples]
        attended = self.activations.last_attended[:num_samples]
        self._layers.end(self._config.num_layers - 1, x, attended)
        final_norm(
            x,
            None,
            self.weights.norm,
            self._config.norm_epsilon,
            batch.sample_rows[:num_samples],
            self._sample_order[:num_samples],
            table.faulted,
            batch.sizes[3:],
            self.activations.sampled,
            overlap=True,
        )

    def finish_tokens(
        self, index: torch.Tensor, rows: torch.Tensor, table: SequenceTensors, count: torch.Tensor
    ) -> None:
        """Compute what is left of a prefill for some of its tokens, and leave the normed hidden
        states in `activations.sampled`, in place of the samples'.

        index, rows: [tokens] int32, where each stands in the batch, and its table row; count:
        [>= 1] int32, how many; what follows is padding. No more than there is room for samples.
        """
        tokens, activations = len(index), self.activations
        x, attended = activations.last_x[:tokens], activations.last_attended[:tokens]
        torch.index_select(activations.x, 0, index, out=x)
        torch.index_select(activations.attended, 0, index, out=attended)
        self._layers.end(self._config.num_layers - 1, x, attended)
        final_norm(
            x,
            None,
            self.weights.norm,
            self._config.norm_epsilon,
            rows,
            self._sample_order[:tokens],
            table.faulted,
            count,
            activations.sampled,
            overlap=True,
        )

    def _embed(self, batch: BatchTensors, num_tokens: int) -> torch.Tensor:
        """Begin the residual stream, [num_tokens, hidden], and leave its first norm in `normed`."""
        x, normed = self.activations.x[:num_tokens], self.activations.normed[:num_tokens]
        embed_rms_norm(
            batch.token_ids[:num_tokens],
            self.weights.embedding,
            self.weights.layers[0].input_norm,
            x,
            normed,
            self._config.norm_epsilon,
        )
        return x

    def compute_logits(self, num_samples: int) -> torch.Tensor:
        """Logits of the first samples, padding included: [num_samples, vocab_size] float32."""
        sampled = self.activations.sampled[:num_samples]
        logits = self.activations.logits[:num_samples]
        if num_samples <= gemv.VECTOR_ROWS:
            gemv.gemv_logits(sampled, self.weights.head, logits)
        else:
            torch.mm(sampled, self.weights.head.t(), torch.float32, out=logits)
        return logits
