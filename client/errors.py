"""What a call can raise: one type for every way in which a caller would act differently.

Owns the translation of gRPC's errors. Does not know which calls there are.
"""
# ruff: noqa: N818  (the names are read as mili.client.NotFound, beside MiliError)

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import grpc
from google.rpc import error_details_pb2, status_pb2

from mili.v1 import inference_pb2


class MiliError(Exception):
    """A call failed.

    code: the gRPC status. reason: the server's own word for it, for instance "QUEUE_FULL"; empty
    when the error is not the server's. field: the offending field of the request, or empty.
    retry_after: seconds after which another try makes sense, if the server named them.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        field: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason
        self.field = field
        self.retry_after = retry_after


class InvalidRequest(MiliError):
    """The request itself is wrong: the same one will fail again."""


class NotAllowed(MiliError):
    """The token is missing or no tenant's, or its tenant may not ask for this."""


class NotFound(MiliError):
    """No such model, or no such request."""


class Overloaded(MiliError):
    """The server has no room at present, or the tenant has had its share: try again after
    `retry_after`. Without one, as when a quota is spent, there is no point in it soon."""


class Unavailable(MiliError):
    """The server cannot be reached, or has no worker: try again, perhaps elsewhere."""


class DeadlineExceeded(MiliError):
    """The call's timeout passed."""


class Cancelled(MiliError):
    """The call was cancelled."""


class ServerError(MiliError):
    """The server failed. Not the caller's fault, and not known to be gone at the next try."""


_TYPES: dict[grpc.StatusCode, type[MiliError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.ALREADY_EXISTS: InvalidRequest,
    grpc.StatusCode.UNIMPLEMENTED: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: NotAllowed,
    grpc.StatusCode.PERMISSION_DENIED: NotAllowed,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.DATA_LOSS: ServerError,
}
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


@contextmanager
def translated_errors() -> Iterator[None]:
    """Let MiliError out where gRPC raises its own."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def from_rpc_error(error: grpc.RpcError) -> MiliError:
    """What gRPC raised, with the details that the server's trailers carry."""
    code, message = error.code(), error.details() or ""
    metadata = cast(Iterable[tuple[str, bytes]], error.trailing_metadata() or ())
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    retry_after = None
    status = status_pb2.Status.FromString(dict(metadata).get("grpc-status-details-bin", b""))
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
        if detail.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    # The size limit has no reason of its own: gRPC refuses such a message before MILI sees it.
    too_large = not info.reason and "larger than max" in message
    error_type = InvalidRequest if too_large else _TYPES.get(code, MiliError)
    return error_type(
        code,
        message,
        reason=info.reason,
        field=bad.field_violations[0].field if bad.field_violations else "",
        retry_after=retry_after,
    )


def from_message(error: inference_pb2.Error) -> MiliError:
    """The error of a sequence that failed inside a call that went well."""
    code = _CODES.get(error.code, grpc.StatusCode.UNKNOWN)
    return _TYPES.get(code, MiliError)(code, error.message, reason=error.reason)
