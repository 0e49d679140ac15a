"""The worker's settings: names, defaults, help and limits.

Owns nothing else: where a value comes from (flag, environment, file) is cli's business.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class WorkerConfig(BaseModel):
    """Settings of one worker process."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(description="Folder, short name or hub id of the model to serve.")
    router: str = Field(
        default="tcp://127.0.0.1:50053", description="The router's worker link: tcp:// or ipc://."
    )
    name: str = Field(default="", description="Name of this worker. Default: host name.")
    worker_keys: Path | None = Field(
        default=None, description="Folder of CURVE keys made by `mili keygen`."
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Where the model runs.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="auto: bfloat16 on a GPU and where the CPU multiplies it, else float32.",
    )
    load_format: Literal["auto", "random"] = Field(
        default="auto", description="random: weights of the model's shapes, without files."
    )
    max_model_len: int | None = Field(
        default=None, ge=2, description="Context limit in tokens. Default: the model's."
    )
    max_num_seqs: int = Field(
        default=256, ge=1, le=4096, description="Sequences in one step at most."
    )
    max_num_batched_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens in one step at most. Default: 8192 on a GPU, 128 on a CPU.",
    )
    block_size: int = Field(default=16, ge=1, le=256, description="Tokens in one KV block.")
    kv_cache_memory_bytes: int | None = Field(
        default=None,
        ge=1,
        description="Memory of the KV cache. Default: what a GPU has left, 25 % of a CPU's free.",
    )
    kv_cache_memory_fraction: float = Field(
        default=0.25, gt=0, le=1, description="Default KV cache on a CPU: this share of free."
    )
    gpu_memory_utilization: float = Field(
        default=0.90, gt=0, le=1, description="Share of the GPU's memory that MILI may take."
    )
    enforce_eager: bool = Field(
        default=False, description="Launch each kernel by itself, without CUDA graphs."
    )
    profile: Path | None = Field(
        default=None, description="Folder to write a profiler's trace of the GPU worker to."
    )
    num_gpu_blocks_override: int | None = Field(
        default=None, ge=2, description="Number of KV blocks, whatever the memory."
    )
    num_threads: int | None = Field(
        default=None, ge=1, description="Compute threads. Default: all cores."
    )
    health_port: int = Field(
        default=0, ge=0, le=65535, description="gRPC health port of the worker; 0 for none."
    )
    metrics_port: int = Field(
        default=0, ge=0, le=65535, description="Port of the Prometheus metrics; 0 for none."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe log line to print."
    )
    log_format: Literal["console", "json"] = Field(
        default="console", description="console for people, json for machines."
    )
