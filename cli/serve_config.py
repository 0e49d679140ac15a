"""The settings of `mili serve`: the router's, the workers', the HTTP front's, and how many workers.

Owns nothing else. Apart from serve.py, which is slow to import.
"""

from __future__ import annotations

from pydantic import Field

from mili.cli.http_config import HttpConfig
from mili.router.config import RouterConfig
from mili.worker.config import WorkerConfig


class ServeConfig(WorkerConfig, RouterConfig, HttpConfig):
    """Settings of one machine that serves a model."""

    http_port: int = Field(
        default=0, ge=0, le=65535, description="Port of OpenAI's HTTP API; 0 for none."
    )
    workers: int = Field(default=1, ge=1, le=64, description="Worker processes to start.")


# Fields that serve settles itself, because it starts both ends of the link.
DECIDED_BY_SERVE = frozenset(
    {
        "address",
        "worker_link",
        "router",
        "worker_keys",
        "insecure_worker_link",
        "name",
        "health_port",
    }
)
