"""The router's settings: names, defaults, help and limits.

Owns nothing else: where a value comes from (flag, environment, file) is cli's business.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RouterConfig(BaseModel):
    """Settings of one router process."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(description="Folder, short name or hub id of the model to serve.")
    served_model_name: tuple[str, ...] = Field(
        default=(), description="Name in the API, then aliases. Default: the folder's name."
    )
    host: str = Field(default="127.0.0.1", description="Address of the public gRPC port.")
    port: int = Field(default=50051, ge=0, le=65535, description="Public gRPC port; 0 picks one.")
    admin_host: str = Field(default="127.0.0.1", description="Address of the AdminService.")
    admin_port: int = Field(
        default=50052, ge=0, le=65535, description="AdminService port; 0 picks one."
    )
    worker_link: str = Field(
        default="tcp://127.0.0.1:50053", description="Where workers connect: tcp:// or ipc://."
    )
    worker_keys: Path | None = Field(
        default=None, description="Folder of CURVE keys made by `mili keygen`."
    )
    insecure_worker_link: bool = Field(
        default=False, description="Allow a worker link beyond loopback without keys."
    )
    pipeline_depth: int | None = Field(
        default=None,
        ge=1,
        le=8,
        description="Step commands in flight per worker group. Default: 2; 3 for short steps.",
    )
    tenants: Path | None = Field(
        default=None, description="TOML file of tenants and their limits. Default: all may call."
    )
    max_queued_requests: int = Field(
        default=1024, ge=1, description="Requests that may wait; more are refused."
    )
    max_queue_time: float = Field(
        default=10.0,
        gt=0,
        description="Seconds that a request waits at most, if it does not say.",
    )
    allocation: Literal["first-fit", "best-fit"] = Field(
        default="first-fit",
        description="Which free KV blocks come next: best-fit keeps long runs, first-fit is quick.",
    )
    eviction_policy: Literal["lru", "token-limit"] = Field(
        default="lru",
        description="When cached prefixes go: lru for want of blocks, token-limit over a cap too.",
    )
    cache_token_limit: int | None = Field(
        default=None,
        ge=0,
        description="Tokens cached per worker group with token-limit. Default: no cap.",
    )
    max_unread_tokens: int = Field(
        default=8192,
        ge=256,
        description="Tokens that may wait for the reader of a stream; with more it is ended.",
    )
    max_concurrent_rpcs: int = Field(
        default=8192,
        ge=1,
        description="Calls that may be open on a port, health checks apart; more are refused.",
    )
    itl_goal: float = Field(
        default=0.05,
        gt=0,
        description="Seconds between a stream's tokens that prompts should not exceed.",
    )
    worker_timeout: float = Field(
        default=1.0, ge=0.5, description="Seconds without progress until a worker is lost."
    )
    recovery_timeout: float = Field(
        default=60.0, ge=0, description="Seconds a request waits for a worker before it fails."
    )
    drain_timeout: float = Field(
        default=30.0, ge=0, description="Seconds that running requests get at shutdown."
    )
    metrics_port: int = Field(
        default=0, ge=0, le=65535, description="Port of the Prometheus metrics; 0 for none."
    )
    recorded_decisions: int = Field(
        default=10_000,
        ge=0,
        description="Scheduling decisions per worker group in the flight recorder; 0 for none.",
    )
    recording_folder: Path | None = Field(
        default=None,
        description="Where recordings go on SIGUSR1 or a crash. Default: the temporary folder.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe log line to print."
    )
    log_format: Literal["console", "json"] = Field(
        default="console", description="console for people, json for machines."
    )

    @model_validator(mode="after")
    def _check_ports(self) -> Self:
        if self.port == self.admin_port != 0 and self.host == self.admin_host:
            raise ValueError(
                f"port and admin_port are both {self.port} on {self.host}: they must differ"
            )
        return self

    @model_validator(mode="after")
    def _check_cache(self) -> Self:
        if self.cache_token_limit is not None and self.eviction_policy != "token-limit":
            raise ValueError(
                "cache_token_limit is for eviction_policy token-limit, "
                f"and it is {self.eviction_policy}"
            )
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name in self.served_model_name:
            if not name or "," in name:
                raise ValueError(
                    f"served_model_name {name!r}: a name is not empty and has no comma in it"
                )
        return self
