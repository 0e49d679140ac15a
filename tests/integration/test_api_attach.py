"""Calls that come back, over real sockets: resume tokens, request ids, and killed clients."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc import aio
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_status import rpc_status

from mili.router.api.server import ApiServer
from mili.router.errors import Reason
from mili.router.outcome import Finish, FinishReason, Recovery, RequestOutput
from mili.router.tenants import Tenant, Tenants
from mili.v1 import inference_pb2 as pb
from mili.v1 import inference_pb2_grpc
from tests.fake_engine import FakeEngine, letter, make_folder, refuse_with, running_api

PATIENCE = 10.0
Stub: TypeAlias = "inference_pb2_grpc.InferenceServiceAsyncStub"


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[tuple[ApiServer, FakeEngine]]:
    async with running_api(make_folder(tmp_path / "demo")) as running:
        yield running


@pytest.fixture
def engine(api: tuple[ApiServer, FakeEngine]) -> FakeEngine:
    return api[1]


@pytest.fixture
async def stub(api: tuple[ApiServer, FakeEngine]) -> AsyncIterator[Stub]:
    async with aio.insecure_channel(f"127.0.0.1:{api[0].public_port}") as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def asking(
    max_tokens: int,
    request_id: str = "",
    window: int = 0,
    **options: Any,  # noqa: ANN401
) -> pb.GenerateStreamRequest:
    generation = pb.Generation(text="hello", stopping=pb.StopConditions(max_tokens=max_tokens))
    request = pb.GenerateStreamRequest(
        request_id=request_id, generation=generation, stream_options=pb.StreamOptions(**options)
    )
    request.stream_options.resume_window.seconds = window
    return request


async def reason_of(call: Any) -> str:  # noqa: ANN401
    status = await rpc_status.aio.from_call(call)
    info = error_details_pb2.ErrorInfo()
    assert status is not None and status.details[0].Unpack(info)
    return info.reason


async def events_of(call: Any) -> list[pb.StreamEvent]:  # noqa: ANN401
    events = []
    while (response := await call.read()) is not aio.EOF:
        events.append(response.event)
    return events


def text_of(events: Sequence[pb.StreamEvent]) -> str:
    """The text of events, which must be numbered without a hole."""
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    return "".join(event.delta.text for event in events)


def letters(count: int) -> str:
    return "".join(letter(index) for index in range(count))


async def test_a_stream_goes_on_where_the_caller_left_it(stub: Stub, engine: FakeEngine) -> None:
    call = stub.GenerateStream(asking(20, window=60))
    await engine.submitted.get()
    engine.step()
    responses = aiter(call)
    events = [(await anext(responses)).event]
    started = events[0].started
    assert started.resume_token.startswith(started.instance_id + ".")
    events.append((await anext(responses)).event)
    call.cancel()
    await engine.run()  # with nobody there
    attached = stub.AttachStream(
        pb.AttachStreamRequest(resume_token=started.resume_token, after_sequence=len(events))
    )
    events += await events_of(attached)
    assert text_of(events) == letters(20)
    assert events[-1].finished.usage.completion_tokens == 20
    from_the_start = stub.AttachStream(pb.AttachStreamRequest(resume_token=started.resume_token))
    assert await events_of(from_the_start) == events
    done = pb.AttachStreamRequest(resume_token=started.resume_token, after_sequence=len(events))
    assert await events_of(stub.AttachStream(done)) == []
    gone = stub.AttachStream(done)
    assert await gone.code() is grpc.StatusCode.NOT_FOUND
    assert await reason_of(gone) == "REQUEST_NOT_FOUND"


async def test_attached_beside_the_first_call(stub: Stub, engine: FakeEngine) -> None:
    call = stub.GenerateStream(asking(20, window=60))
    await engine.submitted.get()
    engine.step()
    first = await call.read()
    token = first.event.started.resume_token
    attached = stub.AttachStream(pb.AttachStreamRequest(resume_token=token))
    assert (await attached.read()).event == first.event
    await engine.run()
    assert [first.event, *await events_of(call)] == [first.event, *await events_of(attached)]


async def test_a_token_of_another_router_names_it(stub: Stub) -> None:
    other = "ab" * 16
    call = stub.AttachStream(pb.AttachStreamRequest(resume_token=f"{other}.{'x' * 32}"))
    assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert await reason_of(call) == "OTHER_INSTANCE"
    resource = error_details_pb2.ResourceInfo()
    status = await rpc_status.aio.from_call(call)
    assert any(detail.Unpack(resource) for detail in status.details)
    assert (resource.resource_type, resource.resource_name) == ("router", other)


# Reads a stream, or attaches to one, and writes the number and text of every event it has read.
CLIENT = """
import sys, grpc
from mili.v1 import inference_pb2 as pb, inference_pb2_grpc
address, token, after = sys.argv[1], sys.argv[2], int(sys.argv[3])
stub = inference_pb2_grpc.InferenceServiceStub(grpc.insecure_channel(address))
request = pb.GenerateStreamRequest(generation=pb.Generation(text="x"))
request.generation.stopping.max_tokens = 59
request.stream_options.resume_window.seconds = 60
attach = pb.AttachStreamRequest(resume_token=token, after_sequence=after)
for response in stub.AttachStream(attach) if token else stub.GenerateStream(request):
    event = response.event
    print(event.sequence, event.started.resume_token or event.delta.text or "end", flush=True)
"""


async def test_a_killed_client_gets_the_rest(
    api: tuple[ApiServer, FakeEngine], engine: FakeEngine
) -> None:
    address = f"127.0.0.1:{api[0].public_port}"
    lines: list[list[str]] = []
    token, kills = "", 0
    while not lines or lines[-1][1] != "end":
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CLIENT, address, token, str(len(lines))),
            stdout=asyncio.subprocess.PIPE,
        )
        assert client.stdout is not None
        if not token:
            await asyncio.wait_for(engine.submitted.get(), PATIENCE)
        for _ in range(8):
            if engine.lengths:
                engine.step()
            line = await asyncio.wait_for(client.stdout.readline(), PATIENCE)
            lines.append(line.decode().split())
            token = token or lines[0][1]
            if lines[-1][1] == "end":
                break
        else:
            client.kill()
            kills += 1
            if kills == 2:
                await engine.run()  # all the rest, while nobody is there
        await client.wait()
    assert kills >= 2
    assert [int(number) for number, _ in lines] == list(range(1, len(lines) + 1))
    assert "".join(text for _, text in lines[1:-1]) == letters(59)


async def test_the_same_request_again_joins_and_is_answered_again(
    stub: Stub, engine: FakeEngine
) -> None:
    first, second = (stub.GenerateStream(asking(12, "mine")) for _ in range(2))
    await engine.submitted.get()
    engine.step()
    assert await first.read() == await second.read()
    await engine.run()
    rest = await events_of(first)
    assert await events_of(second) == rest
    again = await events_of(stub.GenerateStream(asking(12, "mine")))
    assert again[1:] == rest
    assert text_of(again) == letters(12)
    assert engine.submitted.empty(), "it was generated once"


async def test_a_whole_answer_again(stub: Stub, engine: FakeEngine) -> None:
    request = pb.GenerateRequest(request_id="mine", generation=asking(5).generation)
    first, second = stub.Generate(request), stub.Generate(request)
    await engine.submitted.get()
    await engine.run()
    answer = await first
    assert answer.sequences[0].text == letters(5)
    assert await second == answer == await stub.Generate(request)
    assert engine.submitted.empty()


async def test_an_id_is_not_anothers(stub: Stub, engine: FakeEngine) -> None:
    generation = asking(3).generation
    first = stub.GenerateStream(pb.GenerateStreamRequest(request_id="mine", generation=generation))
    await engine.submitted.get()
    others: list[Any] = [
        stub.GenerateStream(asking(4, "mine")),
        stub.Generate(pb.GenerateRequest(request_id="mine", generation=generation)),
    ]
    for other in others:
        assert await other.code() is grpc.StatusCode.ALREADY_EXISTS
        assert await reason_of(other) == "REQUEST_ID_CONFLICT"
    await engine.run()
    assert text_of(await events_of(first)) == letters(3)


async def test_a_refused_id_may_be_tried_again(stub: Stub, engine: FakeEngine) -> None:
    engine.refusal = refuse_with(Reason.QUEUE_FULL)
    refused = stub.GenerateStream(asking(3, "mine", window=60))
    assert await reason_of(refused) == "QUEUE_FULL"
    engine.refusal = None
    again = stub.GenerateStream(asking(3, "mine", window=60))
    await engine.submitted.get()
    await engine.run()
    assert text_of(await events_of(again)) == letters(3)


async def test_who_joins_keeps_it_alive(stub: Stub, engine: FakeEngine) -> None:
    first, second = (stub.GenerateStream(asking(1000, "mine")) for _ in range(2))
    await engine.submitted.get()
    engine.step()
    for call in (first, second):
        await call.read()
    first.cancel()
    engine.step()
    await second.read()
    assert engine.cancelled.empty()
    second.cancel()
    assert await asyncio.wait_for(engine.cancelled.get(), PATIENCE) == "mine"


async def test_cancel_by_id_ends_a_stream_that_nobody_reads(stub: Stub, engine: FakeEngine) -> None:
    call = stub.GenerateStream(asking(1000, "mine", window=60))
    await engine.submitted.get()
    engine.step()
    token = (await call.read()).event.started.resume_token
    call.cancel()
    assert (await stub.CancelGeneration(pb.CancelGenerationRequest(request_id="mine"))).cancelled
    events = await events_of(stub.AttachStream(pb.AttachStreamRequest(resume_token=token)))
    assert events[-1].finished.finish_reason == pb.FINISH_REASON_CANCELLED


async def test_headers_wait_for_the_first_event(stub: Stub, engine: FakeEngine) -> None:
    ordinary = stub.GenerateStream(asking(3))
    await engine.submitted.get()
    named = stub.GenerateStream(asking(3, "mine", window=60))
    await engine.submitted.get()
    headers = [asyncio.create_task(call.initial_metadata()) for call in (ordinary, named)]
    await asyncio.sleep(0.2)
    assert not any(header.done() for header in headers)
    for request_id in list(engine.lengths):
        engine.start(request_id)
    await asyncio.wait_for(asyncio.gather(*headers), PATIENCE)
    await engine.run()
    for call in (ordinary, named):
        assert text_of(await events_of(call)) == letters(3)


async def test_messages_of_four_tokens(stub: Stub, engine: FakeEngine) -> None:
    call = stub.GenerateStream(asking(10, max_tokens_per_message=4))
    await engine.submitted.get()
    await engine.run()
    events = await events_of(call)
    assert text_of(events) == letters(10)
    assert [event.delta.num_tokens for event in events if event.HasField("delta")] == [4, 4, 2]


@pytest.mark.parametrize("wanted", [True, False])
async def test_recovery_is_told_to_who_wants_to_know(
    stub: Stub, engine: FakeEngine, wanted: bool
) -> None:
    call = stub.GenerateStream(asking(10, include_recovery_notices=wanted))
    request_id = await engine.submitted.get()
    engine.step()
    recovery = Recovery(Reason.WORKER_LOST, 33, 1.5)
    engine.deliver([RequestOutput(request_id, first_token_index=1, recovery=recovery)])
    if wanted:  # as if there were another sequence
        engine.deliver([RequestOutput(request_id, index=3, recovery=recovery)])
    await engine.run()
    events = await events_of(call)
    assert text_of(events) == letters(10)
    notices = [event.recovery for event in events if event.HasField("recovery")]
    expected = pb.RecoveryNotice(reason="WORKER_LOST", recomputed_tokens=33)
    expected.gap.FromMilliseconds(1500)
    other = pb.RecoveryNotice()
    other.MergeFrom(expected)
    other.index = 3
    assert notices == [expected, other] * wanted


async def test_a_token_is_of_no_use_to_another_tenant(tmp_path: Path) -> None:
    digests = ["2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"]  # of foo
    digests += ["fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9"]  # of bar
    tenants = Tenants(
        [Tenant(name=f"t{i}", token_sha256=(digest,)) for i, digest in enumerate(digests)]
    )
    foo, bar = ((("authorization", f"Bearer {token}"),) for token in ("foo", "bar"))
    async with (
        running_api(make_folder(tmp_path / "demo"), tenants) as (server, engine),
        aio.insecure_channel(f"127.0.0.1:{server.public_port}") as channel,
    ):
        stub: Stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.GenerateStream(asking(3, "mine", window=60), metadata=foo)
        await engine.submitted.get()
        await engine.run()
        events = await events_of(call)
        attach = pb.AttachStreamRequest(resume_token=events[0].started.resume_token)
        stolen = stub.AttachStream(attach, metadata=bar)
        assert await reason_of(stolen) == "REQUEST_NOT_FOUND"
        assert await events_of(stub.AttachStream(attach, metadata=foo)) == events
        own = stub.GenerateStream(asking(4, "mine", window=60), metadata=bar)
        assert await engine.submitted.get() == "t1/mine"
        await engine.run()
        assert text_of(await events_of(own)) == letters(4)


async def test_too_many_open_calls(tmp_path: Path) -> None:
    async with (
        running_api(make_folder(tmp_path / "demo"), max_concurrent_rpcs=3) as (server, engine),
        aio.insecure_channel(f"127.0.0.1:{server.public_port}") as channel,
    ):
        stub: Stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = [stub.GenerateStream(asking(1000)) for _ in range(3)]
        for _ in calls:
            await engine.submitted.get()
        refused = stub.GenerateStream(asking(1))
        assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await reason_of(refused) == "TOO_MANY_CALLS"
        assert dict(await refused.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
        healthy = await HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert healthy.status == health_pb2.HealthCheckResponse.SERVING
        calls[0].cancel()
        await asyncio.wait_for(engine.cancelled.get(), PATIENCE)
        async with asyncio.timeout(PATIENCE):
            while (code := await stub.GenerateStream(asking(0)).code()) is not (
                grpc.StatusCode.INVALID_ARGUMENT
            ):
                assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        for request_id in list(engine.lengths):
            engine.finish(request_id, Finish(FinishReason.EOS))
        for call in calls[1:]:
            assert await events_of(call)
