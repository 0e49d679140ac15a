"""Every reason has a status, and says whether and when to try again."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from mili.router.api.status import abort
from mili.router.errors import Reason, RequestError

# With the header that tells a client's own retries to stop; the reader of SLOW_READER has headers
# already, and no client retries by itself after those.
FINAL = {Reason.TENANT_QUOTA, Reason.POISON_REQUEST}
RETRIED_BY_CLIENTS = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}


class AbortedError(Exception):
    """How a call ended."""

    def __init__(self, code: grpc.StatusCode, trailers: dict[str, Any]) -> None:
        super().__init__(code)
        self.code = code
        self.trailers = trailers


class Context:
    async def abort(self, code: grpc.StatusCode, _: str, trailers: Any) -> NoReturn:  # noqa: ANN401
        raise AbortedError(code, dict(trailers))


async def ended(error: RequestError) -> AbortedError:
    with pytest.raises(AbortedError) as caught:
        await abort(Context(), error)  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize("reason", Reason)
async def test_a_clients_retry_is_told_when_or_never(reason: Reason) -> None:
    end = await ended(RequestError(reason, "for the test"))
    pushback = end.trailers.get("grpc-retry-pushback-ms")
    if reason in FINAL:
        assert pushback == "-1"
    elif end.code in RETRIED_BY_CLIENTS and reason is not Reason.SLOW_READER:
        assert int(pushback or 0) > 0
    else:
        assert pushback is None
    status = status_pb2.Status.FromString(end.trailers["grpc-status-details-bin"])
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info) and info.reason == reason
    told = any(detail.Unpack(retry) for detail in status.details)
    assert told == (pushback is not None and pushback != "-1")


async def test_the_time_to_wait_is_the_errors_own() -> None:
    end = await ended(RequestError(Reason.QUEUE_FULL, "full", retry_after=2.5))
    assert end.trailers["grpc-retry-pushback-ms"] == "2500"
