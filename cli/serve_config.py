"""The settings of `mili serve`: the router's, the workers', and how many workers.

Owns nothing else. Apart from serve.py, which is slow to import.
"""

from __future__ import annotations

from pydantic import Field

from mili.router.config import RouterConfig
from mili.worker.config import WorkerConfig


class ServeConfig(WorkerConfig, RouterConfig):
    """Settings of one machine that serves a model."""

    workers: int = Field(default=1, ge=1, le=64, description="Worker processes to start.")


# Fields that serve settles itself, because it starts both ends of the link.
DECIDED_BY_SERVE = frozenset(
    {"worker_link", "router", "worker_keys", "insecure_worker_link", "name", "health_port"}
)
