"""What a failed call tells its caller: a Reason becomes a gRPC status with google.rpc details.

Owns the status contract. Does not know requests, engines or services.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn, TypeAlias

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
    Reason.UNSUPPORTED_METHOD: grpc.StatusCode.UNIMPLEMENTED,
    Reason.CONTEXT_TOO_LONG: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.GRAMMAR_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.GRAMMAR_TOO_COMPLEX: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.MODEL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.REQUEST_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.REQUEST_ID_CONFLICT: grpc.StatusCode.ALREADY_EXISTS,
    Reason.WORKER_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.PIN_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.QUEUE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.QUEUE_TIMEOUT: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.TENANT_RATE_LIMIT: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.TENANT_QUOTA: grpc.StatusCode.RESOURCE_EXHAUSTED,
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


class NotFoundError(RequestError):
    """The thing that the caller named does not exist; `kind` is its message type's name."""

    def __init__(self, reason: Reason, kind: str, name: str, *, field: str) -> None:
        self.kind = kind
        self.name = clip(name, 128)
        super().__init__(reason, f"there is no {kind} {self.name!r}", field=field)


def clip(text: str, length: int = _MAX_TEXT) -> str:
    """Return `text`, shortened to at most `length` characters."""
    return text if len(text) <= length else text[: length - 3] + "..."


def unsupported_method(method: str) -> RequestError:
    """Return the error of an RPC that the API describes and this server does not serve yet."""
    return RequestError(Reason.UNSUPPORTED_METHOD, f"{method} is not served yet")


def duration(seconds: float) -> Duration:
    """Return seconds as a Duration, to the microsecond."""
    whole, micros = divmod(round(seconds * 1e6), 1_000_000)
    return Duration(seconds=whole, nanos=micros * 1000)


def code_number(reason: Reason) -> int:
    """Return the google.rpc.Code of a reason."""
    return int(_CODES[reason].value[0])


async def abort(context: Context, error: RequestError) -> NoReturn:
    """End the call with the error's status, details and retry trailer."""
    code = _CODES[error.reason]
    status = status_pb2.Status(code=code.value[0], message=clip(error.message))
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
    await context.abort(code, status.message, trailers)


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
    if isinstance(error, NotFoundError):
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=error.kind, resource_name=error.name, description=error.message
            )
        )
    if retry_after is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=duration(retry_after)))
    return details
