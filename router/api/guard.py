"""The one interceptor of both listeners: whatever goes wrong leaves as a status of the contract.

Owns the order in which a call is let in (is there room, who calls, then what is asked), reading and
parsing requests, and turning exceptions into statuses. Does not know services.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc import aio

from mili.router.api.health import SERVICE_NAME as HEALTH
from mili.router.api.identity import Identity
from mili.router.api.status import Context, abort
from mili.router.errors import Reason, RequestError

_log = structlog.get_logger()

# When one of so many calls has ended, nobody knows; most last for seconds.
_RETRY_AFTER = 1.0

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Guard(aio.ServerInterceptor):
    """Serves every method as one that takes a stream of raw bytes, and parses them itself.

    The stock stubs answer UNKNOWN to bytes that do not parse, and nothing at all to a call
    without a message.
    """

    def __init__(
        self,
        identity: Identity,
        max_calls: int,
        on_failure: Callable[[Reason], None] = lambda reason: None,
    ) -> None:
        """on_failure hears the reason of every call that ends with an error of ours."""
        self._identity = identity
        self._open_calls = OpenCalls(max_calls)
        self._on_failure = on_failure
        self._guarded: dict[str, _Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        method = handler_call_details.method
        if method not in self._guarded:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None  # grpc answers UNIMPLEMENTED
            let_in = self._let_in(method)
            self._guarded[method] = _guard(method, handler, let_in, self._on_failure)
        return self._guarded[method]

    def _let_in(self, method: str) -> Callable[[Context], None]:
        """A health check is always answered: else a probe would end a server that is only busy."""

        def let_in(context: Context) -> None:
            if method != f"/{HEALTH}/Check":
                self._open_calls.add(context)
            self._identity.establish(method, context)

        return let_in


class OpenCalls:
    """How many calls of a listener are open.

    A call costs memory until its status is read, or its connection or deadline ends. Keepalive ends
    the connections of clients that are gone; gRPC lets nobody end the call of one that is there and
    does not read. So their number has a limit.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0

    def add(self, context: Context) -> None:
        """Count a call until it is over; raise RequestError where it is too many."""
        if self._count >= self._limit:
            message = f"{self._limit} calls are open, which is as many as may"
            raise RequestError(Reason.TOO_MANY_CALLS, message, retry_after=_RETRY_AFTER)
        self._count += 1
        # The stubs want a class of their own here, which is no protocol.
        context.add_done_callback(self._remove)  # type: ignore[arg-type]

    def _remove(self, _: Context) -> None:
        self._count -= 1


def _guard(
    method: str,
    handler: Any,  # noqa: ANN401 - the stubs lack coroutines
    let_in: Callable[[Context], None],
    on_failure: Callable[[Reason], None],
) -> _Handler:
    async def answer_one(requests: AsyncIterator[bytes], context: Context) -> Any:  # noqa: ANN401
        async with _errors_as_status(method, context, on_failure):
            let_in(context)
            request = await _only(requests, handler.request_deserializer)
            return await handler.unary_unary(request, context)

    async def answer_many(requests: AsyncIterator[bytes], context: Context) -> None:
        async with _errors_as_status(method, context, on_failure):
            let_in(context)
            if handler.request_streaming:
                parsed = _each(requests, handler.request_deserializer)
                responses = handler.stream_stream(parsed, context)
            else:
                request = await _only(requests, handler.request_deserializer)
                responses = handler.unary_stream(request, context)
            # Closed here and now: a cancelled call must not wait for the garbage collector.
            async with aclosing(responses):
                async for response in responses:
                    await context.write(response)

    if handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(
            answer_many, response_serializer=handler.response_serializer
        )
    return grpc.stream_unary_rpc_method_handler(
        answer_one, response_serializer=_bytes_or(handler.response_serializer)
    )


def _bytes_or(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Let a method answer with a message or with its bytes, made where they held up nobody."""
    return lambda answer: answer if isinstance(answer, bytes) else serialize(answer)


async def _only(requests: AsyncIterator[bytes], parse: Callable[[bytes], Any]) -> Any:  # noqa: ANN401
    async for message in requests:
        return _parsed(message, parse)
    raise RequestError(Reason.INVALID_FIELD, "the call came without a request message")


async def _each(
    requests: AsyncIterator[bytes], parse: Callable[[bytes], Any]
) -> AsyncIterator[Any]:
    async for message in requests:
        yield _parsed(message, parse)


def _parsed(message: bytes, parse: Callable[[bytes], Any]) -> Any:  # noqa: ANN401
    try:
        return parse(message)
    except DecodeError:
        raise RequestError(
            Reason.INVALID_FIELD,
            "the request is not a valid protobuf message of its type, or not UTF-8 in a string",
        ) from None


@asynccontextmanager
async def _errors_as_status(
    method: str, context: Context, on_failure: Callable[[Reason], None]
) -> AsyncIterator[None]:
    try:
        yield
    except aio.BaseError:  # the library's own: an abort on its way, or a caller who is gone
        raise
    except RequestError as error:
        on_failure(error.reason)
        await abort(context, error)
    except Exception:
        on_failure(Reason.INTERNAL)
        error_id = uuid.uuid4().hex
        _log.exception("call failed by our fault", method=method, error_id=error_id)
        message = f"internal error {error_id}; the server's log holds the details"
        await abort(context, RequestError(Reason.INTERNAL, message))
