"""What a failed call tells its caller: a Reason becomes a gRPC status with google.rpc details.

Owns the status contract. Does not know requests, engines or services.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any, TypeAlias

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from grpc_status import rpc_status

from mili.router.errors import Reason, RequestError

DOMAIN = "mili"

Context: TypeAlias = aio.ServicerContext[Any, Any]

_CODES = {
    Reason.INVALID_FIELD: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.UNSUPPORTED_FIELD: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.CONTEXT_TOO_LONG: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.GRAMMAR_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.GRAMMAR_TOO_COMPLEX: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.MODEL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.REQUEST_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.REQUEST_ID_CONFLICT: grpc.StatusCode.ALREADY_EXISTS,
    Reason.EVENTS_DROPPED: grpc.StatusCode.OUT_OF_RANGE,
    Reason.OTHER_INSTANCE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.WORKER_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.PIN_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.QUEUE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.QUEUE_TIMEOUT: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.TENANT_RATE_LIMIT: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.TENANT_QUOTA: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_CALLS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.SLOW_READER: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.DEADLINE_UNREACHABLE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.NO_WORKERS: grpc.StatusCode.UNAVAILABLE,
    Reason.DRAINING: grpc.StatusCode.UNAVAILABLE,
    Reason.WORKER_LOST: grpc.StatusCode.UNAVAILABLE,
    Reason.NUMERIC_FAULT: grpc.StatusCode.INTERNAL,
    Reason.POISON_REQUEST: grpc.StatusCode.INTERNAL,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
}
_RETRYABLE = frozenset(
    {
        Reason.QUEUE_FULL,
        Reason.QUEUE_TIMEOUT,
        Reason.TOO_MANY_CALLS,
        Reason.TENANT_RATE_LIMIT,
        Reason.NO_WORKERS,
        Reason.DRAINING,
        Reason.WORKER_LOST,
    }
)
# A client that retries by itself must not retry these.
_FINAL = frozenset({Reason.POISON_REQUEST, Reason.TENANT_QUOTA})
_DEFAULT_RETRY_AFTER = 1.0

# Status and details travel as headers, and a client takes 8 KiB of those by default.
_MAX_TEXT = 512


class ResourceError(RequestError):
    """An error about one thing: `kind` is its message type's name."""

    def __init__(self, reason: Reason, kind: str, name: str, message: str, *, field: str) -> None:
        self.kind = kind
        self.name = clip(name, 128)
        super().__init__(reason, message, field=field)


class NotFoundError(ResourceError):
    """The thing that the caller named does not exist."""

    def __init__(self, reason: Reason, kind: str, name: str, *, field: str) -> None:
        message = f"there is no {kind} {clip(name, 128)!r}"
        super().__init__(reason, kind, name, message, field=field)


def clip(text: str, length: int = _MAX_TEXT) -> str:
    """Return `text`, shortened to at most `length` characters."""
    return text if len(text) <= length else text[: length - 3] + "..."


def duration(seconds: float) -> Duration:
    """Return seconds as a Duration, to the microsecond."""
    whole, micros = divmod(round(seconds * 1e6), 1_000_000)
    return Duration(seconds=whole, nanos=micros * 1000)


def code_number(reason: Reason) -> int:
    """Return the google.rpc.Code of a reason."""
    return int(_CODES[reason].value[0])


async def abort(context: Context, error: RequestError) -> None:
    """Send the error's status, details and retry trailer; the handler must then return.

    Raises CancelledError where the caller is gone, and cannot be told.
    """
    code = _CODES[error.reason]
    # A caller's own words may be in it. gRPC encodes what is not ASCII, and now and then a client
    # finds it encoded still: then it differs from the message in the details, which is refused.
    message = clip(error.message).encode("ascii", "backslashreplace").decode()
    status = status_pb2.Status(code=code.value[0], message=message)
    retry_after = _retry_after(error)
    for detail in _details(error, retry_after):
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    trailers = tuple(rpc_status.to_status(status).trailing_metadata)
    if error.reason in _FINAL:
        trailers += (("grpc-retry-pushback-ms", "-1"),)
    elif retry_after is not None:
        trailers += (("grpc-retry-pushback-ms", str(math.ceil(retry_after * 1000))),)
    try:
        await context.abort(code, status.message, trailers)
    except aio.AbortError as aborted:
        # gRPC keeps it with the call, and raises it again when the handler has returned. With our
        # frames in it, it would be garbage that only the collector finds, the request with it.
        aborted.__traceback__ = aborted.__context__ = None
    except aio.InternalError:
        raise asyncio.CancelledError from None


def _retry_after(error: RequestError) -> float | None:
    """Return in how many seconds a retry makes sense; None where none does."""
    if error.reason not in _RETRYABLE:
        return None
    return _DEFAULT_RETRY_AFTER if error.retry_after is None else error.retry_after


def _details(error: RequestError, retry_after: float | None) -> list[Message]:
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=clip(error.field), description=clip(error.message), reason=error.reason
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, ResourceError):
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=error.kind, resource_name=error.name, description=error.message
            )
        )
    if retry_after is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=duration(retry_after)))
    return details
