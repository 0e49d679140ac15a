"""What the engine tells of itself: its load, a request's story, a pinned prefix.

Owns the values only. Does not know who counts them or who asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from mili.router.request import Timing, Usage


class Load(NamedTuple):
    """All worker groups together, now.

    kv_utilization: held blocks of all, 0 to 1. prefix_hit_ratio: prompt tokens that came from the
    cache, 0 to 1. estimated_queue_time: seconds that a request arriving now would wait.
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
    """One thing that happened to a request. at: seconds of the engine's clock."""

    at: float
    kind: str
    detail: str


class Explanation(NamedTuple):
    """A request's story so far. queue_position: from 1; 0 when it does not wait."""

    state: RequestState
    queue_position: int
    usage: Usage
    timing: Timing
    events: Sequence[RequestEvent]


class Pinned(NamedTuple):
    """A prefix that is not evicted: what releases it early, and how many tokens it has."""

    pin_id: str
    num_tokens: int
