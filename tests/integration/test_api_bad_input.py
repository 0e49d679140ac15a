"""Bad input over real sockets: always a named status, never UNKNOWN, and nobody else disturbed."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc import aio
from grpc_status import rpc_status
from structlog.testing import capture_logs

from mili.router.api.server import ApiServer
from mili.v1 import inference_pb2 as pb
from mili.v1 import inference_pb2_grpc, model_pb2, model_pb2_grpc
from tests.fake_engine import CONTEXT_LIMIT, VOCAB_SIZE, FakeEngine, make_folder, running_api

GENERATE = "/mili.v1.InferenceService/Generate"
STREAM = "/mili.v1.InferenceService/GenerateStream"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
NAN = float("nan")


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[tuple[ApiServer, FakeEngine]]:
    async with running_api(make_folder(tmp_path / "demo")) as running:
        yield running


@pytest.fixture
async def channel(api: tuple[ApiServer, FakeEngine]) -> AsyncIterator[aio.Channel]:
    async with aio.insecure_channel(f"127.0.0.1:{api[0].public_port}") as channel:
        yield channel


async def failure(call: Any) -> tuple[grpc.StatusCode, str, str]:  # noqa: ANN401
    """Return a failed call's code, ErrorInfo reason, and the field that BadRequest names."""
    assert await call.code() is not grpc.StatusCode.OK
    status = await rpc_status.aio.from_call(call)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert info.domain == "mili"
    for detail in status.details:
        detail.Unpack(bad)
    fields = [violation.field for violation in bad.field_violations]
    return await call.code(), info.reason, ",".join(fields)


def chat(*roles: str, **fields: Any) -> pb.Generation:  # noqa: ANN401
    messages = [pb.ChatMessage(role=role, content="x") for role in roles]
    return pb.Generation(chat=pb.ChatPrompt(messages=messages, **fields))


def sampled(**fields: Any) -> pb.Generation:  # noqa: ANN401
    return pb.Generation(text="x", sampling=pb.SamplingParams(**fields))


def ids(count: int, value: int = 1) -> pb.Generation:
    return pb.Generation(token_ids=pb.TokenIds(ids=[value] * count))


def stops(count: int) -> pb.Generation:
    return pb.Generation(text="x", stopping=pb.StopConditions(stop_sequences=["x"] * count))


BAD = {
    "no prompt": (pb.Generation(), "INVALID_FIELD", "generation.prompt"),
    "empty text": (pb.Generation(text=""), "INVALID_FIELD", "generation.text"),
    "no ids": (ids(0), "INVALID_FIELD", "generation.token_ids"),
    "no messages": (chat(), "INVALID_FIELD", "generation.chat"),
    "prompt of the limit": (ids(CONTEXT_LIMIT), "CONTEXT_TOO_LONG", "generation.token_ids"),
    "prompt of the limit + 1": (
        pb.Generation(text="x" * (CONTEXT_LIMIT + 1)),
        "CONTEXT_TOO_LONG",
        "generation.text",
    ),
    "text that cannot fit": (
        pb.Generation(text="x" * 8_000_000),
        "CONTEXT_TOO_LONG",
        "generation.text",
    ),
    "prompt of ten pools": (ids(CONTEXT_LIMIT * 10), "CONTEXT_TOO_LONG", "generation.token_ids"),
    "id out of range": (ids(3, VOCAB_SIZE), "INVALID_FIELD", "generation.token_ids"),
    "nan": (sampled(temperature=NAN), "INVALID_FIELD", "generation.sampling.temperature"),
    "negative": (sampled(temperature=-1), "INVALID_FIELD", "generation.sampling.temperature"),
    "top_p 0": (sampled(top_p=0), "INVALID_FIELD", "generation.sampling.top_p"),
    "top_p 2": (sampled(top_p=2), "INVALID_FIELD", "generation.sampling.top_p"),
    "a million stops": (stops(1_000_000), "INVALID_FIELD", "generation.stopping.stop_sequences"),
    "role": (chat("user", "robot"), "INVALID_FIELD", "generation.chat.messages[1].role"),
    "variables": (
        chat("user", template_variables_json="[1]"),
        "INVALID_FIELD",
        "generation.chat.template_variables_json",
    ),
    "deep variables": (
        chat("user", template_variables_json="[" * 60_000),
        "INVALID_FIELD",
        "generation.chat.template_variables_json",
    ),
    "reserved variable": (
        chat("user", template_variables_json='{"messages": []}'),
        "INVALID_FIELD",
        "generation.chat",
    ),
    "presence penalty": (
        sampled(presence_penalty=-3),
        "INVALID_FIELD",
        "generation.sampling.presence_penalty",
    ),
    "bias": (
        sampled(logit_bias={5: NAN}),
        "INVALID_FIELD",
        "generation.sampling.logit_bias[5]",
    ),
    "tools": (
        chat("user", tools=[pb.ToolDefinition(name="f")]),
        "UNSUPPORTED_FIELD",
        "generation.chat.tools",
    ),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_generation(channel: aio.Channel, name: str) -> None:
    generation, reason, field = BAD[name]
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    expected = (grpc.StatusCode.INVALID_ARGUMENT, reason, field)
    whole = stub.Generate(pb.GenerateRequest(generation=generation))
    assert await failure(whole) == expected
    streamed = stub.GenerateStream(pb.GenerateStreamRequest(generation=generation))
    assert await failure(streamed) == expected


async def test_unknown_model(channel: aio.Channel) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    name = "no-such-model" * 1000
    call = stub.Generate(pb.GenerateRequest(generation=pb.Generation(model=name, text="x")))
    expected = (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "generation.model")
    assert await failure(call) == expected
    status = await rpc_status.aio.from_call(call)
    resource = error_details_pb2.ResourceInfo()
    assert any(detail.Unpack(resource) for detail in status.details)
    assert resource.resource_name.startswith("no-such-model")


@pytest.mark.parametrize("request_id", ["x" * 129, "new\nline"])
async def test_bad_request_id(channel: aio.Channel, request_id: str) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    generation = pb.Generation(text="x")
    call = stub.Generate(pb.GenerateRequest(request_id=request_id, generation=generation))
    expected = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "request_id")
    assert await failure(call) == expected


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream"])
@pytest.mark.parametrize("garbage", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe"], ids=["wire", "utf-8"])
async def test_garbage_protobuf(channel: aio.Channel, kind: str, garbage: bytes) -> None:
    method = GENERATE if kind == "unary_unary" else STREAM
    call = getattr(channel, kind)(method)(garbage)
    assert await failure(call) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "")


async def test_garbage_in_a_stream_of_requests(channel: aio.Channel) -> None:
    async def requests() -> AsyncIterator[bytes]:
        yield b"\xff\xff"

    call = channel.stream_stream(REFLECTION)(requests())
    assert await failure(call) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "")


@pytest.mark.parametrize("method", [GENERATE, STREAM])
async def test_a_call_without_a_message(channel: aio.Channel, method: str) -> None:
    async def nothing() -> AsyncIterator[bytes]:
        for message in ():
            yield message

    call = channel.stream_stream(method)(nothing())
    assert await failure(call) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "")


async def test_a_17_mb_message(channel: aio.Channel) -> None:
    call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
        pb.GenerateRequest(generation=pb.Generation(text="x" * 17_000_000))
    )
    assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_15_mb_prompt_is_read_and_refused(channel: aio.Channel) -> None:
    call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
        pb.GenerateRequest(generation=ids(15_000_000))
    )
    assert (await failure(call))[1] == "CONTEXT_TOO_LONG"


async def test_a_refused_request_is_forgotten_at_once(channel: aio.Channel) -> None:
    """Else a flood of them fills the memory, and the loop stands still for seconds to find them."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = pb.GenerateRequest(generation=pb.Generation(text="x" * 15_000_000))
    gc.disable()
    try:
        for _ in range(10):
            assert (await failure(stub.Generate(request)))[1] == "CONTEXT_TOO_LONG"
        held = [thing for thing in gc.get_objects() if isinstance(thing, pb.GenerateRequest)]
    finally:
        gc.enable()
    assert len(held) <= 2  # ours, and perhaps the last that came


async def test_garbage_bytes_on_the_port(
    api: tuple[ApiServer, FakeEngine], channel: aio.Channel
) -> None:
    for garbage in (
        b"\x00" * 1000,
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\n!",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", api[0].public_port)
        writer.write(garbage)
        writer.write_eof()
        await asyncio.wait_for(reader.read(), 10)
        writer.close()
    await model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())


async def test_our_own_fault_is_internal_and_tells_nothing(
    api: tuple[ApiServer, FakeEngine],
    channel: aio.Channel,
) -> None:
    api[1].refusal = KeyError("a secret of the engine")
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    generation = pb.Generation(text="private")
    for whole in (True, False):
        call: Any
        with capture_logs() as logs:
            if whole:
                call = stub.Generate(pb.GenerateRequest(generation=generation))
            else:
                call = stub.GenerateStream(pb.GenerateStreamRequest(generation=generation))
            assert await failure(call) == (grpc.StatusCode.INTERNAL, "INTERNAL", "")
        (event,) = logs
        details = await call.details()
        assert event["error_id"] in details
        assert event["exc_info"]  # the trace, whose format is the log's business
        assert "private" not in str(event)
        assert "private" not in details
        assert "secret" not in details


async def test_bad_calls_disturb_no_other(
    api: tuple[ApiServer, FakeEngine], channel: aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    stopping = pb.StopConditions(max_tokens=30)
    good = stub.Generate(pb.GenerateRequest(generation=pb.Generation(text="x", stopping=stopping)))
    await api[1].submitted.get()
    bad = [
        stub.Generate(pb.GenerateRequest(generation=generation)) for generation, *_ in BAD.values()
    ]
    bad += [channel.unary_unary(GENERATE)(b"\xff\xff\xff") for _ in range(20)]
    codes = await asyncio.gather(*(call.code() for call in bad))
    assert set(codes) == {grpc.StatusCode.INVALID_ARGUMENT}
    await api[1].run()
    assert (await good).usage.completion_tokens == 30
    # grpc itself logs what a handler lets through.
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
