"""Why a request was refused or failed: the vocabulary of the status contract, without gRPC.

Owns the reasons. Does not know which gRPC status a reason becomes: that is router/api/status.py.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """The ErrorInfo reasons that leave the server."""

    INVALID_FIELD = "INVALID_FIELD"
    UNSUPPORTED_FIELD = "UNSUPPORTED_FIELD"
    CONTEXT_TOO_LONG = "CONTEXT_TOO_LONG"
    GRAMMAR_INVALID = "GRAMMAR_INVALID"
    GRAMMAR_TOO_COMPLEX = "GRAMMAR_TOO_COMPLEX"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    REQUEST_NOT_FOUND = "REQUEST_NOT_FOUND"
    REQUEST_ID_CONFLICT = "REQUEST_ID_CONFLICT"
    EVENTS_DROPPED = "EVENTS_DROPPED"
    OTHER_INSTANCE = "OTHER_INSTANCE"
    WORKER_NOT_FOUND = "WORKER_NOT_FOUND"
    PIN_NOT_FOUND = "PIN_NOT_FOUND"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    QUEUE_FULL = "QUEUE_FULL"
    QUEUE_TIMEOUT = "QUEUE_TIMEOUT"
    TOO_MANY_CALLS = "TOO_MANY_CALLS"
    TENANT_RATE_LIMIT = "TENANT_RATE_LIMIT"
    TENANT_QUOTA = "TENANT_QUOTA"
    SLOW_READER = "SLOW_READER"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    DEADLINE_UNREACHABLE = "DEADLINE_UNREACHABLE"
    NO_WORKERS = "NO_WORKERS"
    DRAINING = "DRAINING"
    WORKER_LOST = "WORKER_LOST"
    NUMERIC_FAULT = "NUMERIC_FAULT"
    POISON_REQUEST = "POISON_REQUEST"
    INTERNAL = "INTERNAL"


class RequestError(Exception):
    """A request was refused, or ended without its result.

    field: the path of the offending field below the RPC's request, as in
    "generation.sampling.top_p", or empty. retry_after: seconds after which a retry makes sense.
    """

    def __init__(
        self, reason: Reason, message: str, *, field: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after = retry_after
