"""Tenants over real sockets: who gets in, whose request is whose, what is charged, what is told."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from mili.client import AsyncClient, InvalidRequest, NotAllowed, NotFound, Overloaded
from mili.router.api.server import ApiServer
from mili.router.errors import Reason
from mili.router.outcome import Finish, FinishReason
from mili.router.params import GenerationParams
from mili.router.quotas import Account
from mili.router.tenants import Tenant, Tenants
from mili.v1 import inference_pb2 as pb
from mili.v1 import inference_pb2_grpc, model_pb2, model_pb2_grpc
from tests.fake_engine import FakeEngine, make_folder, refuse_with, running_api

Api = tuple[ApiServer, FakeEngine]
TEN_PROMPT_TOKENS = "x" * 10


def tenant(name: str, **limits: Any) -> Tenant:  # noqa: ANN401
    """A tenant whose token is its name."""
    return Tenant(name=name, token_sha256=(sha256(name.encode()).hexdigest(),), **limits)


TENANTS = [
    tenant("search", weight=3.0, max_priority=5),
    tenant("chat"),
    tenant("slow", requests_per_second=4.0, burst=1),
    tenant("poor", token_quota=40),
    tenant("broke", token_quota=0),
]


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with running_api(make_folder(tmp_path / "demo"), Tenants(TENANTS)) as running:
        yield running


@pytest.fixture
def engine(api: Api) -> FakeEngine:
    return api[1]


@pytest.fixture
async def channel(api: Api) -> AsyncIterator[aio.Channel]:
    async with aio.insecure_channel(f"127.0.0.1:{api[0].public_port}") as channel:
        yield channel


def client_of(api: Api, token: str | None) -> AsyncClient:
    return AsyncClient(f"127.0.0.1:{api[0].public_port}", timeout=10, token=token)


async def submitted(engine: FakeEngine, request_id: str) -> GenerationParams:
    assert await asyncio.wait_for(engine.submitted.get(), 10) == request_id
    return engine.params[request_id]


async def refused(call: Any) -> tuple[str, str, dict[str, Any]]:  # noqa: ANN401
    """Return a failed call's code, reason and trailers."""
    code = (await call.code()).name
    status = await rpc_status.aio.from_call(call)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return code, info.reason, dict(await call.trailing_metadata())


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (("authorization", ""),),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer nobody"),),
        (("authorization", "search"),),
        (("authorization", "Basic search"),),
        (("authorization", "Bearer search"), ("authorization", "Bearer nobody")),
        (("authorization", f"Bearer {sha256(b'search').hexdigest()}"),),
    ],
)
async def test_nobody_gets_in_without_a_token(
    channel: aio.Channel, engine: FakeEngine, headers: tuple[tuple[str, str], ...]
) -> None:
    """Every method of the public port but health, and also with a message that is garbage."""
    request = pb.GenerateStreamRequest(generation=pb.Generation(text="x"))
    inference = inference_pb2_grpc.InferenceServiceStub(channel)
    calls: list[Any] = [
        inference.GenerateStream(request, metadata=headers),
        inference.Generate(pb.GenerateRequest(), metadata=headers),
        inference.CancelGeneration(pb.CancelGenerationRequest(), metadata=headers),
        model_pb2_grpc.ModelServiceStub(channel).ListModels(
            model_pb2.ListModelsRequest(), metadata=headers
        ),
        model_pb2_grpc.TokenizerServiceStub(channel).Tokenize(
            model_pb2.TokenizeRequest(), metadata=headers
        ),
        channel.unary_unary("/mili.v1.InferenceService/Generate")(b"\xff" * 9, metadata=headers),
        channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")(
            iter([b""]), metadata=headers
        ),
    ]
    for call in calls:
        code, reason, trailers = await refused(call)
        assert (code, reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
        assert "grpc-retry-pushback-ms" not in trailers
        assert "nobody" not in await call.details()
    assert engine.submitted.empty()


async def test_health_is_for_everyone(channel: aio.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    for service in ("liveness", "readiness", "mili.v1.InferenceService"):
        response = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert response.status == health_pb2.HealthCheckResponse.SERVING


async def test_the_scheme_has_any_case(channel: aio.Channel) -> None:
    stub = model_pb2_grpc.ModelServiceStub(channel)
    for header in ("bearer search", "BEARER  search "):
        await stub.ListModels(model_pb2.ListModelsRequest(), metadata=(("authorization", header),))


async def test_a_request_carries_its_tenant(api: Api, engine: FakeEngine) -> None:
    async with client_of(api, "search") as client:
        call = asyncio.create_task(
            client.generate(
                "hello",
                request_id="r",
                timeout=7,
                max_tokens=2,
                priority=5,
                max_queue_time=1.5,
                time_limit=2.5,
                session_id="s",
                cache_salt="pepper",
                bypass_cache_read=True,
            )
        )
        before = time.monotonic()
        params = await submitted(engine, "search/r")
        await engine.run()
        assert (await call).request_id == "r", "the caller's own id is what it is told"
    scheduling = params.scheduling
    assert (scheduling.tenant, scheduling.weight, scheduling.priority) == ("search", 3.0, 5)
    assert (scheduling.max_queue_time, scheduling.time_limit) == (1.5, 2.5)
    assert scheduling.session_id == "search/s"
    assert before + 5 < scheduling.deadline < before + 7.1, "of the engine's clock"
    assert params.cache_namespace == TENANTS[0].cache_namespace("pepper")
    assert (params.cache_read, params.cache_write) == (False, True)


async def test_a_call_without_a_deadline_has_none(channel: aio.Channel, engine: FakeEngine) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = pb.GenerateRequest(request_id="r", generation=pb.Generation(text="x"))
    call = stub.Generate(request, metadata=(("authorization", "Bearer chat"),))
    assert (await submitted(engine, "chat/r")).scheduling.deadline == math.inf
    await engine.run()
    await call


async def test_tenants_cannot_touch_each_others_requests(api: Api, engine: FakeEngine) -> None:
    async with client_of(api, "search") as search, client_of(api, "chat") as chat:
        first = asyncio.create_task(search.generate("one", request_id="same", max_tokens=3))
        one = await submitted(engine, "search/same")
        for attempt in ("same", "search/same", "/same", "../search/same"):
            with pytest.raises(NotFound):
                await chat.cancel(attempt)
        second = asyncio.create_task(chat.generate("two", request_id="same", max_tokens=3))
        two = await submitted(engine, "chat/same")
        assert one.cache_namespace != two.cache_namespace
        with pytest.raises(InvalidRequest, match="another request"):
            await search.generate("three", request_id="same")
        assert await chat.cancel("same")
        assert (await second).finish_reason == "cancelled"
        assert "search/same" in engine.lengths
        await engine.run()
        assert (await first).finish_reason == "max_tokens"


async def test_the_cache_is_one_inside_a_tenant_only(api: Api, engine: FakeEngine) -> None:
    spaces = []
    for token in ("search", "search", "chat"):
        for salt in ("", "a"):
            async with client_of(api, token) as client:
                options = {"cache_salt": salt} if salt else {}
                call = asyncio.create_task(client.generate("x", max_tokens=1, **options))
                request_id = await engine.submitted.get()
                spaces.append(engine.params[request_id].cache_namespace)
                await engine.run()
                await call
    assert spaces[:2] == spaces[2:4]
    assert len(set(spaces)) == 4


async def test_a_priority_above_the_tenants_is_not_allowed(api: Api) -> None:
    async with client_of(api, "search") as client:
        with pytest.raises(NotAllowed) as caught:
            await client.generate("x", priority=6)
    assert caught.value.reason == "PERMISSION_DENIED"
    assert caught.value.field == "generation.scheduling.priority"


@pytest.mark.parametrize(
    ("generation", "field"),
    [
        (pb.Generation(scheduling=pb.SchedulingHints(priority=1000)), "scheduling.priority"),
        (
            pb.Generation(scheduling=pb.SchedulingHints(max_queue_time=Duration(seconds=-1))),
            "scheduling.max_queue_time",
        ),
        (
            pb.Generation(stopping=pb.StopConditions(time_limit=Duration())),
            "stopping.time_limit",
        ),
        (pb.Generation(cache=pb.CacheOptions(salt="x" * 2**20)), "cache.salt"),
        (
            pb.Generation(cache=pb.CacheOptions(salt="x", bypass_read=True, bypass_write=True)),
            "cache.salt",
        ),
    ],
    ids=["priority", "queue time in the past", "time limit 0", "salt of 1 MB", "contradiction"],
)
async def test_bad_values_are_named(
    channel: aio.Channel, engine: FakeEngine, generation: pb.Generation, field: str
) -> None:
    generation.text = "x"
    call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
        pb.GenerateRequest(generation=generation), metadata=(("authorization", "Bearer search"),)
    )
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = await rpc_status.aio.from_call(call)
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    assert bad.field_violations[0].field == f"generation.{field}"
    assert engine.submitted.empty()


async def test_over_the_rate_is_told_when_to_come_back(
    channel: aio.Channel, engine: FakeEngine
) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = pb.GenerateRequest(generation=pb.Generation(text="x"))
    metadata = (("authorization", "Bearer slow"),)
    first = stub.Generate(request, metadata=metadata)
    await engine.submitted.get()
    second = stub.Generate(request, metadata=metadata)
    code, reason, trailers = await refused(second)
    assert (code, reason) == ("RESOURCE_EXHAUSTED", "TENANT_RATE_LIMIT")
    assert 0 < int(trailers["grpc-retry-pushback-ms"]) <= 250
    await engine.run()
    await first


async def test_the_client_waits_as_told_and_gets_in(api: Api, engine: FakeEngine) -> None:
    async with client_of(api, "slow") as client:
        started = time.monotonic()
        for _ in range(2):
            call = asyncio.create_task(client.generate("x", max_tokens=1))
            await asyncio.wait_for(engine.submitted.get(), 10)
            await engine.run()
            await call
        assert time.monotonic() - started >= 0.25, "4 a second, and one at once"


async def test_prompts_and_outputs_are_charged_until_nothing_is_left(
    api: Api, engine: FakeEngine
) -> None:
    async with client_of(api, "poor") as client:
        for _ in range(2):  # of 40 tokens
            call = asyncio.create_task(client.generate(TEN_PROMPT_TOKENS, max_tokens=9))
            await engine.submitted.get()
            await engine.run()
            await call
        with pytest.raises(Overloaded, match="2 are left, and 10 are asked for") as caught:
            await client.generate(TEN_PROMPT_TOKENS)
        assert (caught.value.reason, caught.value.retry_after) == ("TENANT_QUOTA", None)
        call = asyncio.create_task(client.generate("x", max_tokens=1))
        await engine.submitted.get()
        await engine.run()
        await call
        with pytest.raises(Overloaded, match="0 are left"):
            await client.generate("x")
    assert engine.submitted.empty()


async def test_every_sequence_is_charged_and_the_prompt_once(
    api: Api, channel: aio.Channel, engine: FakeEngine
) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    generation = pb.Generation(
        text=TEN_PROMPT_TOKENS,
        stopping=pb.StopConditions(max_tokens=9),
        sampling=pb.SamplingParams(num_sequences=3),
    )
    metadata = (("authorization", "Bearer poor"),)
    call = stub.Generate(pb.GenerateRequest(generation=generation), metadata=metadata)
    await engine.submitted.get()
    await engine.run()
    assert (await call).usage.completion_tokens == 27
    async with client_of(api, "poor") as client:
        with pytest.raises(Overloaded, match="3 are left, and 10 are asked for"):
            await client.generate(TEN_PROMPT_TOKENS)


async def test_a_stream_that_is_left_is_charged_as_far_as_it_came(
    api: Api, engine: FakeEngine
) -> None:
    async with client_of(api, "poor") as client:
        stream = client.stream(TEN_PROMPT_TOKENS, max_tokens=50)
        pieces = aiter(stream)
        first = asyncio.ensure_future(anext(pieces))
        await engine.submitted.get()
        for _ in range(28):
            engine.step()
        await first
        stream.close()
        await asyncio.wait_for(engine.cancelled.get(), 10)
        with pytest.raises(Overloaded, match="2 are left"):
            await client.generate(TEN_PROMPT_TOKENS)


async def test_what_the_engine_refuses_is_not_charged(api: Api, engine: FakeEngine) -> None:
    engine.refusal = refuse_with(Reason.CONTEXT_TOO_LONG)
    async with client_of(api, "poor") as client:
        for _ in range(10):
            with pytest.raises(InvalidRequest):
                await client.generate(TEN_PROMPT_TOKENS)
        engine.refusal = None
        call = asyncio.create_task(client.generate("x" * 39, max_tokens=1))
        await engine.submitted.get()
        await engine.run()
        await call


async def test_a_spent_quota_is_not_tried_again(
    api: Api, channel: aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
        pb.GenerateRequest(generation=pb.Generation(text="x")),
        metadata=(("authorization", "Bearer broke"),),
    )
    code, reason, trailers = await refused(call)
    assert (code, reason) == ("RESOURCE_EXHAUSTED", "TENANT_QUOTA")
    assert trailers["grpc-retry-pushback-ms"] == "-1"
    admit = MagicMock(wraps=Account.admit)
    monkeypatch.setattr(Account, "admit", lambda account: admit(account))
    async with client_of(api, "broke") as client:
        with pytest.raises(Overloaded):
            await client.generate("x")
    assert admit.call_count == 1


async def test_the_end_of_a_time_limit_reaches_the_client(api: Api, engine: FakeEngine) -> None:
    async with client_of(api, "search") as client:
        call = asyncio.create_task(client.generate("x", time_limit=60))
        request_id = await engine.submitted.get()
        engine.step()
        engine.finish(request_id, Finish(FinishReason.TIME_LIMIT))
        result = await call
    assert (result.text, result.finish_reason) == ("a", "time_limit")


async def test_a_token_without_a_tenants_file_is_nobodys_business(tmp_path: Path) -> None:
    async with running_api(make_folder(tmp_path / "demo")) as open_api:
        async with client_of(open_api, "anything") as client:
            assert await client.models()
        async with client_of(open_api, None) as client:
            assert await client.models()


@pytest.mark.parametrize("token", ["", "a b", "ä", "a\nb"])
async def test_a_token_that_no_header_holds(api: Api, token: str) -> None:
    with pytest.raises(ValueError, match="token"):
        client_of(api, token)
