"""What a step computes on its way: memory that is made once, for the largest step.

Owns the shapes. Does not know in which order it is written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mili.worker.models.config import DecoderConfig


class Activations(NamedTuple):
    """Every graph writes into the same memory."""

    x: torch.Tensor  # [max_tokens, hidden]: the residual stream
    normed: torch.Tensor  # [max_tokens, hidden]
    qkv: torch.Tensor  # [max_tokens, heads + 2 * kv_heads, head_dim]
    attended: torch.Tensor  # [max_tokens, heads * head_dim]
    gate_up: torch.Tensor  # [max_tokens, 2 * intermediate]
    activated: torch.Tensor  # [max_tokens, intermediate]
    last_x: torch.Tensor  # [max_samples, hidden]: x of a prefill's samples in the last layer
    last_attended: torch.Tensor  # [max_samples, heads * head_dim]: what these attended to there
    sampled: torch.Tensor  # [max_samples, hidden]: normed hidden states that give a token
    logits: torch.Tensor  # [max_samples, vocab_size] float32


def allocate(
    config: DecoderConfig,
    max_tokens: int,
    max_samples: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Activations:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    heads, attended = config.num_heads + 2 * config.num_kv_heads, config.num_heads * config.head_dim
    return Activations(
        x=empty(max_tokens, config.hidden_size),
        normed=empty(max_tokens, config.hidden_size),
        qkv=empty(max_tokens, heads, config.head_dim),
        attended=empty(max_tokens, attended),
        gate_up=empty(max_tokens, 2 * config.intermediate_size),
        activated=empty(max_tokens, config.intermediate_size),
        last_x=empty(max_samples, config.hidden_size),
        last_attended=empty(max_samples, attended),
        sampled=empty(max_samples, config.hidden_size),
        logits=empty(max_samples, config.vocab_size, dtype=torch.float32),
    )
