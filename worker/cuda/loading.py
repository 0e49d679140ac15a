"""From a model folder to a decoder on the GPU: weights are read while the kernels compile.

Owns which kernels a model needs. Does not know what they compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from mili.hub.folder import ModelFolder
from mili.kernels import (
    activation,
    decode_attention,
    gemv,
    logprobs,
    norm,
    prefill_attention,
    rope,
    samples,
)
from mili.kernels.module import Constant, load_all
from mili.kernels.step import MAX_ROWS
from mili.worker.config import WorkerConfig
from mili.worker.cuda.buckets import row_buckets
from mili.worker.cuda.decoder import Decoder
from mili.worker.cuda.layers import few_rows_limit
from mili.worker.dtype import choose_dtype
from mili.worker.models.config import DecoderConfig
from mili.worker.startup import Startup
from mili.worker.weights import open_weights


def load_decoder(
    folder: ModelFolder,
    config: WorkerConfig,
    shape: DecoderConfig,
    startup: Startup,
    *,
    max_tokens: int,
    max_samples: int,
    max_model_len: int,
    device: torch.device,
) -> Decoder:
    """Read or draw the weights, and compile the kernels meanwhile."""
    dtype: torch.dtype = getattr(torch, choose_dtype(config.dtype, config.device))
    with ThreadPoolExecutor(1) as background:
        compiling = background.submit(load_all, list(kernels_of(shape, dtype, config.block_size)))
        with (
            startup.phase("load weights"),
            open_weights(folder, config.load_format, dtype, device) as source,
        ):
            decoder = Decoder(
                shape,
                source,
                max_tokens=max_tokens,
                max_samples=max_samples,
                max_model_len=max_model_len,
                dtype=dtype,
                device=device,
            )
        with startup.phase("compile kernels"):
            compiling.result()
    return decoder


def kernels_of(
    shape: DecoderConfig, dtype: torch.dtype, block_size: int
) -> Iterator[tuple[str, dict[str, Constant]]]:
    """The sources that a model of this shape runs, with their constants."""
    q_size = shape.num_heads * shape.head_dim
    qkv_size = q_size + 2 * shape.num_kv_heads * shape.head_dim
    hidden, size = shape.hidden_size, shape.intermediate_size
    heads = {"num_heads": shape.num_heads, "head_dim": shape.head_dim, "block_size": block_size}
    yield "step", {}
    yield "norm", norm.constants(dtype, hidden)
    yield "activation", activation.constants(dtype, size)
    yield "rope", rope.constants(dtype, num_kv_heads=shape.num_kv_heads, **heads)
    yield (
        "decode_attention",
        decode_attention.constants(
            kv_heads=shape.num_kv_heads, dtype=dtype, max_rows=MAX_ROWS, **heads
        ),
    )
    yield prefill_attention.source(dtype, shape.head_dim)
    yield "samples", samples.constants(dtype, hidden, q_size)
    yield "sampling", {"SCALAR": "__nv_bfloat16"}
    yield "logprobs", logprobs.CONSTANTS
    for rows in row_buckets(few_rows_limit(shape, dtype)):
        for n, k in ((qkv_size, hidden), (hidden, q_size), (hidden, size)):
            yield gemv.source(dtype, rows=rows, n=n, k=k)
        yield gemv.source(dtype, rows=rows, n=size, k=hidden, gated=True)
        if rows <= gemv.VECTOR_ROWS:
            yield gemv.source(dtype, rows=rows, n=shape.vocab_size, k=hidden)
