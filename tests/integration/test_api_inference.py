"""Generation over real sockets: events in order, cancels, deadlines, crowds, slow readers."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc import aio
from grpc_status import rpc_status

from mili.router.api.server import ApiServer
from mili.router.errors import Reason, RequestError
from mili.router.outcome import Finish, FinishReason
from mili.v1 import inference_pb2 as pb
from mili.v1 import inference_pb2_grpc
from tests.fake_engine import FakeEngine, letter, make_folder, refuse_with, running_api

PATIENCE = 10.0


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[tuple[ApiServer, FakeEngine]]:
    async with running_api(make_folder(tmp_path / "demo")) as running:
        yield running


@pytest.fixture
def engine(api: tuple[ApiServer, FakeEngine]) -> FakeEngine:
    return api[1]


@pytest.fixture
async def channel(api: tuple[ApiServer, FakeEngine]) -> AsyncIterator[aio.Channel]:
    async with aio.insecure_channel(f"127.0.0.1:{api[0].public_port}") as channel:
        yield channel


@pytest.fixture
def stub(channel: aio.Channel) -> inference_pb2_grpc.InferenceServiceAsyncStub:
    return inference_pb2_grpc.InferenceServiceStub(channel)


Stub: TypeAlias = "inference_pb2_grpc.InferenceServiceAsyncStub"


def asking(
    max_tokens: int = 4,
    request_id: str = "",
    **options: Any,  # noqa: ANN401
) -> pb.GenerateStreamRequest:
    generation = pb.Generation(
        text="hello",
        stopping=pb.StopConditions(max_tokens=max_tokens),
        output=pb.OutputOptions(**options),
        sampling=pb.SamplingParams(seed=11),
    )
    return pb.GenerateStreamRequest(request_id=request_id, generation=generation)


async def reason_of(call: Any) -> str:  # noqa: ANN401
    """Wait for a call to fail, and return its ErrorInfo's reason."""
    status = await rpc_status.aio.from_call(call)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "mili"
    return info.reason


async def test_one_stream(stub: Stub, engine: FakeEngine) -> None:
    call = stub.GenerateStream(asking(3, "mine", token_ids=True, timing=True))
    assert await engine.submitted.get() == "mine"
    responses = aiter(call)
    engine.start("mine")
    events = [(await anext(responses)).event]
    while engine.lengths:
        engine.step()
        events.append((await anext(responses)).event)
    events += [response.event async for response in responses]
    assert [event.WhichOneof("event") for event in events[:2]] == ["started", "delta"]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    started = events[0].started
    assert (started.prompt_tokens, started.cached_prompt_tokens) == (5, 2)
    assert (started.model, started.seed, started.request_id) == ("demo", 11, "mine")
    assert started.instance_id
    assert started.model_revision
    deltas = [event.delta for event in events if event.HasField("delta")]
    assert "".join(delta.text for delta in deltas) == "abc"
    assert [delta.first_token_index for delta in deltas] == [0, 1, 2]
    assert [list(delta.token_ids) for delta in deltas] == [[0], [1], [2]]
    finished = events[-1].finished
    assert finished.finish_reason == pb.FINISH_REASON_MAX_TOKENS
    assert (finished.usage.completion_tokens, finished.usage.recomputed_tokens) == (3, 3)
    assert finished.timing.time_to_first_token.nanos == 750_000_000
    assert (finished.timing.total.seconds, finished.timing.worker) == (2, "w0")
    spans = (finished.timing.queue, finished.timing.prefill, finished.timing.decode)
    assert [span.ToMilliseconds() for span in spans] == [500, 250, 1500]
    assert (finished.timing.preemptions, finished.timing.recoveries) == (1, 0)
    assert await call.code() is grpc.StatusCode.OK


async def test_only_what_was_asked_for(stub: Stub, engine: FakeEngine) -> None:
    call = stub.GenerateStream(asking(2, text=False))
    await engine.submitted.get()
    await engine.run()
    events = [response.event async for response in call]
    assert sum(event.delta.num_tokens for event in events) == 2
    assert not any(event.delta.text or event.delta.token_ids for event in events)
    assert not events[-1].finished.HasField("timing")


async def test_whole_generation(stub: Stub, engine: FakeEngine) -> None:
    streamed = asking(30, "r", token_ids=True, timing=True)
    call = stub.Generate(pb.GenerateRequest(request_id="r", generation=streamed.generation))
    await engine.submitted.get()
    await engine.run()
    response = await call
    assert (response.request_id, response.model, response.seed) == ("r", "demo", 11)
    (sequence,) = response.sequences
    assert sequence.text == "".join(letter(index) for index in range(30))
    assert list(sequence.token_ids) == list(range(30))
    assert sequence.finish_reason == pb.FINISH_REASON_MAX_TOKENS
    assert response.usage.completion_tokens == 30
    assert response.timing.preemptions == 1


@pytest.mark.parametrize(
    ("finish", "number", "matched"),
    [
        (Finish(FinishReason.EOS), pb.FINISH_REASON_EOS, None),
        (Finish(FinishReason.STOP_TOKEN, 0), pb.FINISH_REASON_STOP_TOKEN, "stop_token_id"),
        (Finish(FinishReason.STOP_SEQUENCE, "x"), pb.FINISH_REASON_STOP_SEQUENCE, "stop_sequence"),
        (Finish(FinishReason.CONTEXT_LENGTH), pb.FINISH_REASON_CONTEXT_LENGTH, None),
    ],
)
async def test_finish_reasons(
    stub: Stub, engine: FakeEngine, finish: Finish, number: int, matched: str | None
) -> None:
    call = stub.GenerateStream(asking())
    engine.finish(await engine.submitted.get(), finish)
    (event,) = [response.event async for response in call]
    assert event.finished.finish_reason == number
    assert event.finished.WhichOneof("matched") == matched


async def test_a_failure_in_the_stream_is_the_calls_status(stub: Stub, engine: FakeEngine) -> None:
    call = stub.GenerateStream(asking())
    request_id = await engine.submitted.get()
    engine.step()
    error = RequestError(Reason.NUMERIC_FAULT, "the logits were not finite")
    engine.finish(request_id, Finish(FinishReason.ERROR, error=error))
    texts = []
    with pytest.raises(aio.AioRpcError) as caught:
        texts += [response.event.delta.text async for response in call]
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert await reason_of(call) == "NUMERIC_FAULT"


@pytest.mark.parametrize(
    ("reason", "code", "pushback"),
    [
        (Reason.QUEUE_FULL, grpc.StatusCode.RESOURCE_EXHAUSTED, "250"),
        (Reason.NO_WORKERS, grpc.StatusCode.UNAVAILABLE, "250"),
        (Reason.WORKER_LOST, grpc.StatusCode.UNAVAILABLE, "250"),
        (Reason.POISON_REQUEST, grpc.StatusCode.INTERNAL, "-1"),
    ],
)
async def test_refusals_come_without_headers_and_say_when_to_retry(
    stub: Stub, engine: FakeEngine, reason: Reason, code: grpc.StatusCode, pushback: str
) -> None:
    engine.refusal = refuse_with(reason, retry_after=0.25)
    call = stub.GenerateStream(asking())
    with pytest.raises(aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is code
    assert await reason_of(call) == reason
    trailers = dict(await call.trailing_metadata())
    assert trailers["grpc-retry-pushback-ms"] == pushback
    assert not tuple(await call.initial_metadata())
    retry = error_details_pb2.RetryInfo()
    status = await rpc_status.aio.from_call(call)
    told = any(detail.Unpack(retry) for detail in status.details)
    assert told == (pushback != "-1")
    assert retry.retry_delay.nanos == (250_000_000 if told else 0)


async def test_a_clients_retry_policy_acts_on_a_refusal(
    api: tuple[ApiServer, FakeEngine], engine: FakeEngine
) -> None:
    policy = (
        '{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 3, "initialBackoff":'
        ' "9s", "maxBackoff": "9s", "backoffMultiplier": 1,'
        ' "retryableStatusCodes": ["UNAVAILABLE"]}}]}'
    )
    engine.refusal = refuse_with(Reason.NO_WORKERS, retry_after=0.05)
    options = (("grpc.service_config", policy),)
    async with aio.insecure_channel(f"127.0.0.1:{api[0].public_port}", options=options) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(asking(1))
        await engine.refused.wait()
        engine.refusal = None
        await asyncio.wait_for(engine.submitted.get(), PATIENCE)
        await engine.run()
        events = [response.event async for response in call]
    assert events[-1].finished.finish_reason == pb.FINISH_REASON_MAX_TOKENS


async def test_a_client_cancels(stub: Stub, engine: FakeEngine) -> None:
    call = stub.GenerateStream(asking(1000))
    request_id = await engine.submitted.get()
    engine.step()
    assert await call.read()
    call.cancel()
    assert await asyncio.wait_for(engine.cancelled.get(), PATIENCE) == request_id


async def test_a_client_cancels_a_whole_generation(stub: Stub, engine: FakeEngine) -> None:
    call = stub.Generate(pb.GenerateRequest(generation=asking().generation))
    request_id = await engine.submitted.get()
    call.cancel()
    assert await asyncio.wait_for(engine.cancelled.get(), PATIENCE) == request_id


async def test_a_connection_goes_away(
    api: tuple[ApiServer, FakeEngine], engine: FakeEngine
) -> None:
    async with aio.insecure_channel(f"127.0.0.1:{api[0].public_port}") as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(asking(1000))
        request_id = await engine.submitted.get()
        engine.step()
        assert await call.read()
    assert await asyncio.wait_for(engine.cancelled.get(), PATIENCE) == request_id


@pytest.mark.parametrize("whole", [True, False])
async def test_a_deadline_ends_the_request(stub: Stub, engine: FakeEngine, whole: bool) -> None:
    request = asking(1000)
    call: Any
    if whole:
        call = stub.Generate(pb.GenerateRequest(generation=request.generation), timeout=0.2)
    else:
        call = stub.GenerateStream(request, timeout=0.2)
    request_id = await engine.submitted.get()
    assert await asyncio.wait_for(engine.cancelled.get(), PATIENCE) == request_id
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


FROZEN_CLIENT = """
import sys, grpc
from mili.v1 import inference_pb2 as pb, inference_pb2_grpc
stub = inference_pb2_grpc.InferenceServiceStub(grpc.insecure_channel(sys.argv[1]))
request = pb.GenerateStreamRequest(generation=pb.Generation(text="x"))
list(stub.GenerateStream(request, timeout=0.7))
"""


async def test_the_server_keeps_the_deadline_of_a_frozen_client(
    api: tuple[ApiServer, FakeEngine], engine: FakeEngine
) -> None:
    address = f"127.0.0.1:{api[0].public_port}"
    client = await asyncio.create_subprocess_exec(sys.executable, "-c", FROZEN_CLIENT, address)
    try:
        request_id = await engine.submitted.get()
        client.send_signal(signal.SIGSTOP)
        assert await asyncio.wait_for(engine.cancelled.get(), PATIENCE) == request_id
    finally:
        client.kill()
        await client.wait()


@pytest.mark.parametrize("whole", [True, False])
async def test_cancel_by_id_ends_the_call_with_ok(
    stub: Stub, engine: FakeEngine, whole: bool
) -> None:
    request = asking(1000, "mine")
    call: Any
    if whole:
        call = stub.Generate(pb.GenerateRequest(request_id="mine", generation=request.generation))
    else:
        call = stub.GenerateStream(request)
    await engine.submitted.get()
    engine.step()
    assert (await stub.CancelGeneration(pb.CancelGenerationRequest(request_id="mine"))).cancelled
    if whole:
        sequence = (await call).sequences[0]
        assert (sequence.text, sequence.finish_reason) == ("a", pb.FINISH_REASON_CANCELLED)
    else:
        events = [response.event async for response in call]
        assert events[-1].finished.finish_reason == pb.FINISH_REASON_CANCELLED
    assert await call.code() is grpc.StatusCode.OK
    again = await stub.CancelGeneration(pb.CancelGenerationRequest(request_id="mine"))
    assert not again.cancelled


async def test_cancel_of_an_unknown_id(stub: Stub) -> None:
    call = stub.CancelGeneration(pb.CancelGenerationRequest(request_id="nobody"))
    assert await call.code() is grpc.StatusCode.NOT_FOUND
    assert await reason_of(call) == "REQUEST_NOT_FOUND"


async def test_two_hundred_streams_and_a_third_of_them_leave(
    stub: Stub, engine: FakeEngine
) -> None:
    tokens = 40

    async def client(number: int) -> str:
        call = stub.GenerateStream(asking(tokens, str(number)))
        text, expected = "", 0
        async for response in call:
            delta = response.event.delta
            if delta.num_tokens:
                assert delta.first_token_index == expected
                expected += delta.num_tokens
            text += delta.text
            if number % 3 == 0 and expected >= 5:
                call.cancel()
                return ""
        assert expected == tokens
        return text

    clients = [asyncio.create_task(client(number)) for number in range(200)]
    for _ in clients:
        await engine.submitted.get()
    await engine.run()
    texts = await asyncio.gather(*clients)
    whole = "".join(letter(index) for index in range(tokens))
    assert [text for number, text in enumerate(texts) if number % 3] == [whole] * 133


async def test_tokens_gather_while_a_write_is_in_flight(stub: Stub, engine: FakeEngine) -> None:
    call = stub.GenerateStream(asking(40, "r"))
    await engine.submitted.get()
    for _ in range(40):  # in one go: the event loop never runs
        engine.step()
    events = [response.event async for response in call]
    assert [event.WhichOneof("event") for event in events] == ["started", "delta", "finished"]
    assert events[1].delta.num_tokens == 40
    assert len(events[1].delta.text) == 40


async def test_the_first_token_does_not_wait_for_others(stub: Stub, engine: FakeEngine) -> None:
    call = stub.GenerateStream(asking(40, "r"))
    await engine.submitted.get()
    engine.step()
    responses = aiter(call)
    assert (await anext(responses)).event.HasField("started")
    assert (await anext(responses)).event.delta.text == "a"
    await engine.run()
    assert [response async for response in responses]


async def test_drain_lets_streams_end(
    api: tuple[ApiServer, FakeEngine], stub: Stub, engine: FakeEngine
) -> None:
    call = stub.GenerateStream(asking(3))
    await engine.submitted.get()
    drained = asyncio.create_task(api[0].drain(60))
    await asyncio.sleep(0)
    refused = stub.GenerateStream(asking(3))
    assert await refused.code() is grpc.StatusCode.UNAVAILABLE
    assert await reason_of(refused) == "DRAINING"
    await engine.run()
    await drained
    assert [response async for response in call]
    assert await call.code() is grpc.StatusCode.OK


async def test_a_stream_that_outlives_the_drain_learns_why(
    api: tuple[ApiServer, FakeEngine], stub: Stub, engine: FakeEngine
) -> None:
    call = stub.GenerateStream(asking(3))
    await engine.submitted.get()
    await api[0].drain(0.01)
    await api[0].stop()
    assert await call.code() is grpc.StatusCode.UNAVAILABLE
    assert await reason_of(call) == "DRAINING"


async def test_nothing_is_left_behind(
    api: tuple[ApiServer, FakeEngine], channel: aio.Channel, engine: FakeEngine
) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    call = stub.GenerateStream(asking(1))
    await engine.submitted.get()
    await engine.run()
    assert [response async for response in call]
    before = len(asyncio.all_tasks())
    for _ in range(20):
        call = stub.GenerateStream(asking(1000))
        await engine.submitted.get()
        call.cancel()
        await asyncio.wait_for(engine.cancelled.get(), PATIENCE)
    async with asyncio.timeout(PATIENCE):
        while len(asyncio.all_tasks()) > before:  # noqa: ASYNC110 - the library's own tasks
            await asyncio.sleep(0.001)
    assert api[0].num_live == 0
