"""How a stream is sent: StreamOptions.

Owns the rules for these values. Does not know streams.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from mili.router.api.durations import to_positive_seconds, to_seconds
from mili.router.errors import Reason, RequestError
from mili.v1 import inference_pb2 as pb

MAX_TOKENS_PER_MESSAGE = 1024
MAX_FLUSH_INTERVAL = 10.0
MAX_RESUME_WINDOW = 600.0

_TOKENS = "stream_options.max_tokens_per_message"
_INTERVAL = "stream_options.max_flush_interval"
_WINDOW = "stream_options.resume_window"


class Flush(NamedTuple):
    """When gathered tokens become a message: at so many, or so many seconds after the first."""

    max_tokens: int
    interval: float


class StreamOptions(NamedTuple):
    """flush: None for the server's own pacing. resume_window: seconds; 0 for none."""

    flush: Flush | None = None
    resume_window: float = 0.0
    recovery_notices: bool = False


def to_stream_options(asked: pb.StreamOptions) -> StreamOptions:
    """Return the checked options; raise RequestError for a bad value."""
    return StreamOptions(
        _flush(asked),
        _at_most(MAX_RESUME_WINDOW, to_seconds(asked.resume_window, _WINDOW), _WINDOW),
        asked.include_recovery_notices,
    )


def _flush(asked: pb.StreamOptions) -> Flush | None:
    counts, waits = asked.HasField("max_tokens_per_message"), asked.HasField("max_flush_interval")
    if not counts and not waits:
        return None
    if counts and not 1 <= asked.max_tokens_per_message <= MAX_TOKENS_PER_MESSAGE:
        raise _invalid(f"must be from 1 to {MAX_TOKENS_PER_MESSAGE}", _TOKENS)
    interval = math.inf
    if waits:
        seconds = to_positive_seconds(asked.max_flush_interval, _INTERVAL)
        interval = _at_most(MAX_FLUSH_INTERVAL, seconds, _INTERVAL)
    return Flush(asked.max_tokens_per_message if counts else MAX_TOKENS_PER_MESSAGE, interval)


def _at_most(limit: float, seconds: float, field: str) -> float:
    if seconds > limit:
        raise _invalid(f"is at most {limit:g} seconds", field)
    return seconds


def _invalid(rule: str, field: str) -> RequestError:
    name = field.rpartition(".")[2]
    return RequestError(Reason.INVALID_FIELD, f"{name} {rule}", field=field)
