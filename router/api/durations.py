"""A caller's Duration as seconds.

Owns what makes one valid. Does not know what it is for.
"""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from mili.router.errors import Reason, RequestError

# As google/protobuf/duration.proto has them: about 10,000 years.
_MAX_SECONDS = 315_576_000_000
_MAX_NANOS = 999_999_999


def to_seconds(duration: Duration, field: str) -> float:
    """Return seconds from 0 up; raise RequestError for what is negative or no duration at all."""
    seconds, nanos = duration.seconds, duration.nanos
    if not (0 <= seconds <= _MAX_SECONDS and 0 <= nanos <= _MAX_NANOS):
        raise RequestError(
            Reason.INVALID_FIELD, "it is negative, or not a valid duration", field=field
        )
    return seconds + nanos / 1e9


def to_positive_seconds(duration: Duration, field: str) -> float:
    """Return seconds above 0; raise RequestError for all else."""
    seconds = to_seconds(duration, field)
    if seconds == 0:
        raise RequestError(Reason.INVALID_FIELD, "it must be above 0", field=field)
    return seconds
