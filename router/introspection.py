"""What the engine tells of itself when it is asked: load, and the story of one request.

Owns the shape of the answers. Does not know how they come to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from mili.router.outcome import Timing, Usage


class Load(NamedTuple):
    """Of all worker groups together. Times are in seconds.

    kv_utilization: the part of all KV blocks that running requests hold. prefix_hit_ratio: the part
    of prompt tokens that came from the cache, of the last seconds. estimated_queue_time: what a
    request of the usual size would wait that came now.
    """

    queued_requests: int
    queued_prompt_tokens: int
    running_sequences: int
    kv_utilization: float
    prefix_hit_ratio: float
    output_tokens_per_second: float
    estimated_queue_time: float


class RequestState(IntEnum):
    """Equal in number to mili.v1.RequestState (a test proves it)."""

    QUEUED = 1
    PREFILL = 2
    DECODE = 3
    PREEMPTED = 4
    RECOVERING = 5
    ENDED = 6


class RequestEvent(NamedTuple):
    """at: seconds of the engine's clock. kind: queued, placed, started, preempted, ..."""

    at: float
    kind: str
    detail: str


class Explanation(NamedTuple):
    """queue_position: how many go before it; 0 for a request that does not wait."""

    state: RequestState
    queue_position: int
    usage: Usage
    timing: Timing
    events: Sequence[RequestEvent]


class Pinned(NamedTuple):
    """A prefix that is not evicted: what releases it early, and how many tokens it has."""

    pin_id: str
    num_tokens: int
