"""What operators see and do: load, drains, a request's story, pins and flushes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc import aio
from grpc_status import rpc_status

from mili.router.api.admin import WorkerStatus
from mili.router.api.server import ApiServer
from mili.router.errors import Reason
from mili.router.introspection import Explanation, Load, RequestEvent, RequestState
from mili.router.outcome import Finish, FinishReason, Timing, Usage
from mili.router.tenants import Tenant, Tenants
from mili.router.worker_group import WorkerState
from mili.v1 import admin_pb2 as pb
from mili.v1 import admin_pb2_grpc, inference_pb2
from tests.fake_engine import (
    CONTEXT_LIMIT,
    VOCAB_SIZE,
    FakeEngine,
    make_folder,
    refuse_with,
    running_api,
)

Api = tuple[ApiServer, FakeEngine]
MINUTE = Duration(seconds=60)
SEARCH = Tenant(name="search", token_sha256=("0" * 64,), weight=2.0)


def worker(name: str, group: str) -> WorkerStatus:
    return WorkerStatus(
        name, "i", WorkerState.SERVING, 0.0, None, 9, 5, 3, 1, group, 0, 1, b"w" * 32, []
    )


@pytest.fixture(params=[(), (SEARCH,)], ids=["open", "tenants"])
def tenants(request: pytest.FixtureRequest) -> Sequence[Tenant]:
    chosen: Sequence[Tenant] = request.param
    return chosen


@pytest.fixture
async def api(tmp_path: Path, tenants: Sequence[Tenant]) -> AsyncIterator[Api]:
    async with running_api(make_folder(tmp_path / "demo"), Tenants(tenants)) as running:
        running[1].known_workers = [worker("w0", "g0"), worker("w1", "g1")]
        yield running


@pytest.fixture
def engine(api: Api) -> FakeEngine:
    return api[1]


@pytest.fixture
async def operator(api: Api) -> AsyncIterator[Any]:
    """Nobody asks an operator for a token: its listener is not the public one."""
    async with aio.insecure_channel(f"127.0.0.1:{api[0].admin_port}") as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


async def refused(call: Any) -> tuple[str, str]:  # noqa: ANN401
    """Return a failed call's reason, and the field that it names."""
    status = await rpc_status.aio.from_call(call)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    for detail in status.details:
        detail.Unpack(bad)
    return info.reason, ",".join(violation.field for violation in bad.field_violations)


async def test_load_at_every_interval(operator: Any, engine: FakeEngine) -> None:  # noqa: ANN401
    engine.current_load = Load(3, 700, 12, 0.5, 0.75, 812.5, 1.25)
    call = operator.WatchLoad(pb.WatchLoadRequest(interval=Duration(nanos=100_000_000)))
    first = await call.read()
    assert first.load == pb.Load(
        queued_requests=3,
        queued_prompt_tokens=700,
        running_sequences=12,
        kv_utilization=0.5,
        prefix_hit_ratio=0.75,
        output_tokens_per_second=812.5,
        estimated_queue_time=Duration(seconds=1, nanos=250_000_000),
    )
    assert [each.name for each in first.workers] == ["w0", "w1"]
    started = time.monotonic()
    assert await call.read() == first, "told again, although nothing has changed"
    assert await call.read() == first
    assert 0.15 < time.monotonic() - started < 2
    call.cancel()


async def test_load_at_every_change(operator: Any, engine: FakeEngine) -> None:  # noqa: ANN401
    call = operator.WatchLoad(pb.WatchLoadRequest())
    assert (await call.read()).load.queued_requests == 0
    following = asyncio.ensure_future(call.read())
    await asyncio.sleep(1.2)
    assert not following.done()
    engine.current_load = engine.current_load._replace(queued_requests=1)
    assert (await asyncio.wait_for(following, 5)).load.queued_requests == 1
    call.cancel()


@pytest.mark.parametrize(
    "interval", [Duration(), Duration(nanos=99_000_000), Duration(seconds=3601), Duration(nanos=-1)]
)
async def test_intervals_that_are_none(operator: Any, interval: Duration) -> None:  # noqa: ANN401
    call = operator.WatchLoad(pb.WatchLoadRequest(interval=interval))
    assert await refused(call) == ("INVALID_FIELD", "interval")


async def test_drain_and_undrain(operator: Any, engine: FakeEngine) -> None:  # noqa: ANN401
    response = await operator.DrainWorker(pb.DrainWorkerRequest(name="w1"))
    assert response.running_sequences == 7
    assert engine.draining == {"g1": None}
    await operator.DrainWorker(pb.DrainWorkerRequest(name="w0", migrate_after=Duration()))
    await operator.DrainWorker(pb.DrainWorkerRequest(name="w1", migrate_after=MINUTE))
    assert engine.draining == {"g0": 0.0, "g1": 60.0}
    await operator.UndrainWorker(pb.UndrainWorkerRequest(name="w0"))
    assert engine.draining == {"g1": 60.0}


async def test_unknown_workers(operator: Any, engine: FakeEngine) -> None:  # noqa: ANN401
    for name in ("", "g0", "w2"):
        for call in (
            operator.DrainWorker(pb.DrainWorkerRequest(name=name)),
            operator.UndrainWorker(pb.UndrainWorkerRequest(name=name)),
        ):
            assert await refused(call) == ("WORKER_NOT_FOUND", "name")
    bad = pb.DrainWorkerRequest(name="w0", migrate_after=Duration(seconds=-1))
    assert await refused(operator.DrainWorker(bad)) == ("INVALID_FIELD", "migrate_after")
    assert not engine.draining


async def test_a_requests_story(operator: Any, engine: FakeEngine) -> None:  # noqa: ANN401
    engine.explanations["search/r"] = Explanation(
        RequestState.RECOVERING,
        4,
        Usage(10, 2, 3, 1),
        Timing(0.5, 0.25, 0.75, 1.5, 2.25, 1, 2, "w0"),
        [RequestEvent(time.monotonic() - 30, "worker_lost", "w1")],
    )
    told = await operator.ExplainRequest(pb.ExplainRequestRequest(request_id="search/r"))
    assert (told.state, told.queue_position) == (pb.REQUEST_STATE_RECOVERING, 4)
    assert (told.usage.prompt_tokens, told.usage.recomputed_tokens) == (10, 1)
    assert (told.timing.queue.nanos, told.timing.recoveries) == (500_000_000, 2)
    (event,) = told.events
    assert (event.kind, event.detail) == ("worker_lost", "w1")
    assert abs(event.time.ToDatetime().timestamp() - time.time() + 30) < 24 * 3600
    assert abs(event.time.seconds - (time.time() - 30)) < 5, "the calendar's time"
    unknown = operator.ExplainRequest(pb.ExplainRequestRequest(request_id="r"))
    assert await refused(unknown) == ("REQUEST_NOT_FOUND", "request_id")


def prefix(tenants: Sequence[Tenant], **fields: Any) -> pb.PinPrefixRequest:  # noqa: ANN401
    values = {"text": "x" * 40, "time_to_live": MINUTE, "tenant": "search" if tenants else ""}
    return pb.PinPrefixRequest(**{**values, **fields})


async def test_pin_and_unpin(
    operator: Any,  # noqa: ANN401
    engine: FakeEngine,
    tenants: Sequence[Tenant],
) -> None:
    call = operator.PinPrefix(prefix(tenants))
    request_id = await engine.submitted.get()
    params = engine.params[request_id]
    assert (params.max_tokens, len(params.prompt_token_ids)) == (1, 40)
    assert params.cache_namespace == (SEARCH.cache_prefix if tenants else b"")
    assert params.scheduling.tenant == ("search" if tenants else "")
    assert not engine.pins, "nothing is pinned before it is computed"
    await engine.run()
    response = await call
    assert (response.pin_id, response.pinned_tokens) == ("pin", 32)
    assert engine.pins["pin"] == (params.cache_namespace, list(params.prompt_token_ids), 60.0)
    await operator.UnpinPrefix(pb.UnpinPrefixRequest(pin_id="pin"))
    assert not engine.pins
    again = operator.UnpinPrefix(pb.UnpinPrefixRequest(pin_id="pin"))
    assert (await refused(again))[0] == "PIN_NOT_FOUND"


async def test_a_prefix_of_token_ids_is_pinned_as_it_is(
    operator: Any,  # noqa: ANN401
    engine: FakeEngine,
    tenants: Sequence[Tenant],
) -> None:
    ids = [*range(20, 40)]
    call = operator.PinPrefix(prefix(tenants, token_ids=inference_pb2.TokenIds(ids=ids)))
    await engine.submitted.get()
    await engine.run()
    assert (await call).pinned_tokens == 16
    assert engine.pins["pin"][1] == ids


async def test_a_pinned_chat_does_not_open_the_answer(
    operator: Any,  # noqa: ANN401
    engine: FakeEngine,
    tenants: Sequence[Tenant],
) -> None:
    message = inference_pb2.ChatMessage(role="system", content="be kind " * 4)
    chat = inference_pb2.ChatPrompt(messages=[message])
    request = prefix(tenants, chat=chat)
    call = operator.PinPrefix(request)
    params = engine.params[await engine.submitted.get()]
    assert len(params.prompt_token_ids) == len("<system>" + message.content)
    await engine.run()
    await call


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"time_to_live": None}, "INVALID_FIELD", "time_to_live"),
        ({"time_to_live": Duration(seconds=-5)}, "INVALID_FIELD", "time_to_live"),
        ({"time_to_live": Duration(seconds=31 * 86400)}, "INVALID_FIELD", "time_to_live"),
        ({"text": None}, "INVALID_FIELD", "prefix"),
        ({"text": "x" * 15}, "INVALID_FIELD", "text"),
        ({"text": "x" * CONTEXT_LIMIT}, "CONTEXT_TOO_LONG", "text"),
        ({"token_ids": inference_pb2.TokenIds()}, "INVALID_FIELD", "token_ids"),
        (
            {"token_ids": inference_pb2.TokenIds(ids=[VOCAB_SIZE] * 20)},
            "INVALID_FIELD",
            "token_ids",
        ),
        ({"chat": inference_pb2.ChatPrompt()}, "INVALID_FIELD", "chat"),
        ({"tenant": "nobody"}, "INVALID_FIELD", "tenant"),
        ({"model": "other"}, "MODEL_NOT_FOUND", "model"),
    ],
)
async def test_pins_that_are_refused(
    operator: Any,  # noqa: ANN401
    engine: FakeEngine,
    tenants: Sequence[Tenant],
    fields: dict[str, Any],
    reason: str,
    field: str,
) -> None:
    if "token_ids" in fields or "chat" in fields:
        fields = {"text": None, **fields}
    assert await refused(operator.PinPrefix(prefix(tenants, **fields))) == (reason, field)
    assert engine.submitted.empty()


async def test_a_pin_needs_a_tenant_where_there_are_any(
    operator: Any,  # noqa: ANN401
    tenants: Sequence[Tenant],
) -> None:
    call = operator.PinPrefix(prefix(tenants, tenant="" if tenants else "search"))
    assert await refused(call) == ("INVALID_FIELD", "tenant")


async def test_a_prefix_that_cannot_be_computed_is_not_pinned(
    operator: Any,  # noqa: ANN401
    engine: FakeEngine,
    tenants: Sequence[Tenant],
) -> None:
    call = operator.PinPrefix(prefix(tenants))
    failed = Finish(FinishReason.ERROR, error=refuse_with(Reason.WORKER_LOST))
    engine.finish(await engine.submitted.get(), failed)
    assert (await refused(call))[0] == "WORKER_LOST"
    engine.refusal = refuse_with(Reason.NO_WORKERS)
    assert (await refused(operator.PinPrefix(prefix(tenants))))[0] == "NO_WORKERS"
    assert not engine.pins


async def test_an_operator_who_leaves_pins_nothing(
    operator: Any,  # noqa: ANN401
    engine: FakeEngine,
    tenants: Sequence[Tenant],
) -> None:
    call = operator.PinPrefix(prefix(tenants))
    request_id = await engine.submitted.get()
    call.cancel()
    assert await asyncio.wait_for(engine.cancelled.get(), 5) == request_id
    assert not engine.pins


async def test_flush(operator: Any, engine: FakeEngine, tenants: Sequence[Tenant]) -> None:  # noqa: ANN401
    response = await operator.FlushCache(pb.FlushCacheRequest())
    assert response.freed_blocks == 5
    if tenants:
        await operator.FlushCache(pb.FlushCacheRequest(tenant="search"))
    unknown = operator.FlushCache(pb.FlushCacheRequest(tenant="nobody"))
    assert await refused(unknown) == ("INVALID_FIELD", "tenant")
    assert engine.flushed == [None, *(each.cache_prefix for each in tenants)]
