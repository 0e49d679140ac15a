"""Several sequences in one call, over gRPC: indices, ends, failures, quotas and slow readers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest

from mili.router.errors import Reason, RequestError
from mili.router.outcome import Finish, Finished, FinishReason, RequestOutput, Timing, Usage
from mili.v1 import inference_pb2 as pb
from mili.v1.inference_pb2_grpc import InferenceServiceStub
from tests.fake_engine import FakeEngine, letter, make_folder, running_api
from tests.integration.test_api_inference import reason_of

Stub: TypeAlias = Any

FAILED = Finish(FinishReason.ERROR, error=RequestError(Reason.NUMERIC_FAULT, "not a number"))
WELL = Finish(FinishReason.EOS)


@pytest.fixture
async def engine_and_stub(tmp_path: Path) -> AsyncIterator[tuple[FakeEngine, Stub]]:
    folder = make_folder(tmp_path / "demo")
    async with (
        running_api(folder, max_unread_tokens=256) as (api, engine),
        grpc.aio.insecure_channel(f"127.0.0.1:{api.public_port}") as channel,
    ):
        yield engine, InferenceServiceStub(channel)


@pytest.fixture
def engine(engine_and_stub: tuple[FakeEngine, Stub]) -> FakeEngine:
    return engine_and_stub[0]


@pytest.fixture
def stub(engine_and_stub: tuple[FakeEngine, Stub]) -> Stub:
    return engine_and_stub[1]


def asking(count: int, max_tokens: int = 5) -> pb.Generation:
    return pb.Generation(
        model="demo",
        text="hello",
        stopping=pb.StopConditions(max_tokens=max_tokens),
        output=pb.OutputOptions(token_ids=True),
        sampling=pb.SamplingParams(num_sequences=count, seed=3),
    )


def ended(request_id: str, index: int, finish: Finish, left: int, others: bool) -> RequestOutput:
    usage, timing = Usage(5, 0, 7, 0), Timing(0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, "w")
    finished = Finished(finish, usage, timing, left, others)
    return RequestOutput(request_id, finished=finished, index=index)


async def test_every_sequence_has_its_index_in_the_stream(stub: Stub, engine: FakeEngine) -> None:
    call = stub.GenerateStream(pb.GenerateStreamRequest(generation=asking(3)))
    await engine.submitted.get()
    await engine.run()
    events = [response.event async for response in call]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert [event.WhichOneof("event") for event in events].count("started") == 1
    assert events[0].HasField("started")
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for event in events:
        if event.HasField("delta"):
            assert event.delta.first_token_index == len(tokens[event.delta.index])
            tokens[event.delta.index] += event.delta.token_ids
    assert tokens == {index: list(range(5)) for index in range(3)}
    ends = [event.finished for event in events if event.HasField("finished")]
    assert [end.index for end in ends] == [0, 1, 2]
    assert events[-1].finished == ends[-1]
    assert ends[-1].usage.completion_tokens == 15


async def test_the_whole_has_every_sequence_in_its_place(stub: Stub, engine: FakeEngine) -> None:
    call = stub.Generate(pb.GenerateRequest(request_id="a", generation=asking(3)))
    assert await engine.submitted.get() == "a"
    engine.step()
    del engine.lengths["a"]
    ends = ((2, WELL, 2), (0, WELL, 1), (1, Finish(FinishReason.STOP_TOKEN, 7), 0))
    for index, finish, left in ends:
        engine.deliver([ended("a", index, finish, left, others=True)])
        await asyncio.sleep(0)
    response = await call
    assert [sequence.index for sequence in response.sequences] == [0, 1, 2]
    assert [sequence.text for sequence in response.sequences] == [letter(0)] * 3
    assert response.sequences[1].stop_token_id == 7
    assert response.usage.completion_tokens == 7
    assert response.seed == 3


async def test_one_that_fails_alone_is_told_in_its_place(stub: Stub, engine: FakeEngine) -> None:
    stream = stub.GenerateStream(pb.GenerateStreamRequest(request_id="s", generation=asking(2)))
    whole = stub.Generate(pb.GenerateRequest(request_id="w", generation=asking(2)))
    for _ in range(2):
        await engine.submitted.get()
    for name in ("s", "w"):
        del engine.lengths[name]
        engine.deliver([ended(name, 0, WELL, 1, others=False)])
        engine.deliver([ended(name, 1, FAILED, 0, others=True)])
    last = [response.event async for response in stream][-1].finished
    for failed in (last, (await whole).sequences[1]):
        assert (failed.index, failed.finish_reason) == (1, pb.FINISH_REASON_ERROR)
        assert failed.error.code == grpc.StatusCode.INTERNAL.value[0]
        assert failed.error.reason == "NUMERIC_FAULT"
        assert failed.error.message == "not a number"
    assert await stream.code() is grpc.StatusCode.OK


async def test_all_failed_is_the_calls_status(stub: Stub, engine: FakeEngine) -> None:
    stream = stub.GenerateStream(pb.GenerateStreamRequest(request_id="s", generation=asking(2)))
    whole = stub.Generate(pb.GenerateRequest(request_id="w", generation=asking(2)))
    for _ in range(2):
        await engine.submitted.get()
    for name in ("s", "w"):
        del engine.lengths[name]
        engine.deliver([ended(name, 1, FAILED, 1, others=False)])
        engine.deliver([ended(name, 0, FAILED, 0, others=False)])
    assert (await stream.read()).event.finished.index == 1
    with pytest.raises(grpc.aio.AioRpcError):
        await stream.read()
    with pytest.raises(grpc.aio.AioRpcError):
        await whole
    assert await reason_of(stream) == await reason_of(whole) == "NUMERIC_FAULT"


async def test_unread_tokens_of_all_sequences_count_together(
    stub: Stub, engine: FakeEngine
) -> None:
    call = stub.GenerateStream(pb.GenerateStreamRequest(request_id="s", generation=asking(8, 60)))
    await engine.submitted.get()
    while engine.lengths:  # without a pause, so that nobody reads
        engine.step()
    with pytest.raises(grpc.aio.AioRpcError):
        _ = [response async for response in call]
    assert await reason_of(call) == "SLOW_READER"


async def test_a_cancelled_call_ends_with_each_of_its_sequences(
    stub: Stub, engine: FakeEngine
) -> None:
    call = stub.GenerateStream(pb.GenerateStreamRequest(request_id="s", generation=asking(3)))
    await engine.submitted.get()
    response = await stub.CancelGeneration(pb.CancelGenerationRequest(request_id="s"))
    assert response.cancelled
    ends = [response.event.finished async for response in call]
    assert [end.index for end in ends] == [0, 1, 2]
    assert {end.finish_reason for end in ends} == {pb.FINISH_REASON_CANCELLED}


@pytest.mark.parametrize("count", [0, 129])
async def test_how_many_there_may_be(stub: Stub, engine: FakeEngine, count: int) -> None:
    call = stub.Generate(pb.GenerateRequest(generation=asking(count)))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    assert await reason_of(call) == "INVALID_FIELD"
    assert "from 1 to 128" in (refused.value.details() or "")
