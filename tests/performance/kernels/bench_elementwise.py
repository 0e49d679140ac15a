"""Norm, rotary embedding and activation: one line each per model and number of tokens.

Small inputs stay in the L2 cache, as they do in a step, where the kernel before has just written
them: there the time counts, not the share of memory's speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from mili.kernels.activation import silu_and_mul
from mili.kernels.norm import add_rms_norm_, embed_rms_norm, final_norm, rms_norm
from mili.kernels.rope import qk_norm_rope_write, rope_table
from mili.kernels.samples import gather_samples
from tests.performance.kernels.line import Line, line, timed

TOKENS = (1, 64, 256, 8192)
EPSILON = 1e-6
_DEVICE = torch.device("cuda")
_INPUTS = 2  # of each kernel, in turn
_BLOCK_SIZE, _HEAD_DIM, _LENGTH = 16, 128, 8192


class Model(NamedTuple):
    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int


MODELS = (Model("8B", 4096, 12288, 32, 8, 151936), Model("0.6B", 1024, 3072, 16, 8, 151936))

# The bytes that one call moves, and a call on each of several inputs.
Job = tuple[int, list[Callable[[], None]]]


def lines() -> list[Line]:
    return [
        line(kernel, f"{model.name}, {tokens} tokens", timed(calls), bytes_moved, "GB/s")
        for model in MODELS
        for tokens in TOKENS
        for kernel, (bytes_moved, calls) in _jobs(model, tokens)
    ]


def _jobs(model: Model, tokens: int) -> Iterator[tuple[str, Job]]:
    """One at a time, so that memory is used again."""
    yield "rms_norm", _rms_norm(model, tokens)
    yield "add_rms_norm", _add_rms_norm(model, tokens)
    yield "embed_rms_norm", _embed_rms_norm(model, tokens)
    yield "final_norm", _final_norm(model, tokens)
    yield "gather_samples", _gather_samples(model, tokens)
    yield "qk_norm_rope_write", _rope(model, tokens)
    yield "silu_and_mul", _silu_and_mul(model, tokens)


def _random(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=_DEVICE).normal_()


def _ints(high: int, count: int) -> torch.Tensor:
    return torch.randint(high, (count,), dtype=torch.int32, device=_DEVICE)


def _rms_norm(model: Model, tokens: int) -> Job:
    weight = _random(model.hidden)

    def call() -> Callable[[], None]:
        x, out = _random(tokens, model.hidden), _random(tokens, model.hidden)
        return lambda: rms_norm(x, weight, out, EPSILON)

    return 4 * tokens * model.hidden, [call() for _ in range(_INPUTS)]


def _add_rms_norm(model: Model, tokens: int) -> Job:
    weight = _random(model.hidden)

    def call() -> Callable[[], None]:
        x, delta, out = (_random(tokens, model.hidden) for _ in range(3))
        return lambda: add_rms_norm_(x, delta, weight, out, EPSILON)

    return 8 * tokens * model.hidden, [call() for _ in range(_INPUTS)]


def _embed_rms_norm(model: Model, tokens: int) -> Job:
    weight, embedding = _random(model.hidden), _random(model.vocab, model.hidden)

    def call() -> Callable[[], None]:
        x, out = (_random(tokens, model.hidden) for _ in range(2))
        token_ids = _ints(model.vocab, tokens)
        return lambda: embed_rms_norm(token_ids, embedding, weight, x, out, EPSILON)

    return 6 * tokens * model.hidden, [call() for _ in range(_INPUTS)]


def _gather_samples(model: Model, tokens: int) -> Job:
    """Of 8192 tokens 16 sample, of fewer one."""
    samples, attended_size = 16 if tokens > 256 else 1, model.heads * _HEAD_DIM
    sample_index, rows, faulted = _last_sample(tokens, samples), _ints(256, tokens), _ints(1, 256)
    sizes = torch.tensor([tokens, 0, 0, samples], dtype=torch.int32, device=_DEVICE)

    def call() -> Callable[[], None]:
        x, attended = _random(tokens, model.hidden), _random(tokens, attended_size)
        out_x, out_attended = _random(samples, model.hidden), _random(samples, attended_size)
        return lambda: gather_samples(
            x, attended, rows, sample_index, faulted, sizes, out_x, out_attended
        )

    size = model.hidden + attended_size
    return 2 * (tokens + samples) * size, [call() for _ in range(_INPUTS)]


def _last_sample(tokens: int, samples: int) -> torch.Tensor:
    """The sample index of each token."""
    sample_index = torch.full((tokens,), -1, dtype=torch.int32, device=_DEVICE)
    sample_index[-samples:] = torch.arange(samples, dtype=torch.int32, device=_DEVICE)
    return sample_index


def _final_norm(model: Model, tokens: int) -> Job:
    """Of 8192 tokens 16 are sampled, as in a step of prefill; of fewer all, as in decode."""
    weight, samples = _random(model.hidden), 16 if tokens > 256 else tokens
    sample_index, rows, faulted = _last_sample(tokens, samples), _ints(256, tokens), _ints(1, 256)
    sizes = torch.tensor([tokens, 0, 0, samples], dtype=torch.int32, device=_DEVICE)

    def call() -> Callable[[], None]:
        x, delta = (_random(tokens, model.hidden) for _ in range(2))
        out = _random(samples, model.hidden)
        return lambda: final_norm(
            x, delta, weight, EPSILON, rows, sample_index, faulted, sizes, out
        )

    return (4 * tokens + 2 * samples) * model.hidden, [call() for _ in range(_INPUTS)]


def _rope(model: Model, tokens: int) -> Job:
    norms = _random(_HEAD_DIM), _random(_HEAD_DIM)
    exponents = torch.arange(0, _HEAD_DIM, 2, device=_DEVICE) / _HEAD_DIM
    table = rope_table(1.0 / 1e6**exponents, _LENGTH, 1.0)
    all_heads = model.heads + 2 * model.kv_heads

    def call() -> Callable[[], None]:
        qkv = _random(tokens, all_heads, _HEAD_DIM)
        cache = _random(tokens // _BLOCK_SIZE + 2, 2 * model.kv_heads, _BLOCK_SIZE, _HEAD_DIM)
        positions = torch.arange(tokens, dtype=torch.int32, device=_DEVICE)
        slots = positions + _BLOCK_SIZE
        return lambda: qk_norm_rope_write(
            qkv, *norms, table, positions, slots, cache, model.heads, EPSILON
        )

    # Queries, keys and values are read and written, and each token has its row of the table.
    return tokens * _HEAD_DIM * (4 * all_heads + 4), [call() for _ in range(_INPUTS)]


def _silu_and_mul(model: Model, tokens: int) -> Job:
    def call() -> Callable[[], None]:
        gate_up = _random(tokens, 2 * model.intermediate)
        out = _random(tokens, model.intermediate)
        return lambda: silu_and_mul(gate_up, out)

    return 6 * tokens * model.intermediate, [call() for _ in range(_INPUTS)]
