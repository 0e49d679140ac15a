"""The settings of `mili http`, the process in front of a router that speaks OpenAI's HTTP API.

Owns nothing else. Apart from the code that it sets, which is slow to import.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class HttpConfig(BaseModel):
    """Settings of one HTTP front."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    address: str = Field(default="localhost:50051", description="The router's host:port.")
    http_host: str = Field(default="127.0.0.1", description="Address of OpenAI's HTTP API.")
    http_port: int = Field(default=8000, ge=1, le=65535, description="Port of OpenAI's HTTP API.")
    drain_timeout: float = Field(
        default=30.0, ge=0, description="Seconds that running requests get at shutdown."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe log line to print."
    )
    log_format: Literal["console", "json"] = Field(
        default="console", description="console for people, json for machines."
    )
