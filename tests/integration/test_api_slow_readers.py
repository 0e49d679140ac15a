"""Clients that read slowly, or not at all, over real sockets: they harm nobody but themselves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc import aio
from grpc_status import rpc_status

from mili.router.api.server import ApiServer
from mili.router.outcome import Finish, FinishReason, RequestOutput
from mili.v1 import inference_pb2 as pb
from mili.v1 import inference_pb2_grpc
from tests.fake_engine import FakeEngine, make_folder, running_api

Stub: TypeAlias = "inference_pb2_grpc.InferenceServiceAsyncStub"

# A window that does not grow: the server's writes wait for the reads of the client.
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_535))
MAX_UNREAD = 1000
# So long a text for a token fills a window soon.
LONG = "x" * 15
PATIENCE = 10.0


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[tuple[ApiServer, FakeEngine]]:
    folder = make_folder(tmp_path / "demo")
    async with running_api(folder, max_unread_tokens=MAX_UNREAD) as running:
        yield running


@pytest.fixture
def engine(api: tuple[ApiServer, FakeEngine]) -> FakeEngine:
    return api[1]


@asynccontextmanager
async def client(api: tuple[ApiServer, FakeEngine]) -> AsyncIterator[Stub]:
    address = f"127.0.0.1:{api[0].public_port}"
    async with aio.insecure_channel(address, options=SMALL_WINDOW) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def ask(request_id: str) -> pb.GenerateStreamRequest:
    generation = pb.Generation(text="hello", stopping=pb.StopConditions(max_tokens=10**6))
    return pb.GenerateStreamRequest(request_id=request_id, generation=generation)


async def generate(
    engine: FakeEngine, *names: str, while_true: Callable[[int], bool]
) -> tuple[int, float]:
    """A token for each, again and again; returns how many, and the longest of the steps' delays."""
    count, longest, stepped = 0, 0.0, time.monotonic()
    while while_true(count):
        engine.deliver([RequestOutput(name, (count,), LONG, count) for name in names])
        count += 1
        await asyncio.sleep(0.0005)
        longest, stepped = max(longest, time.monotonic() - stepped), time.monotonic()
    return count, longest


async def test_a_slow_reader_gets_fewer_and_larger_deltas(
    api: tuple[ApiServer, FakeEngine], engine: FakeEngine
) -> None:
    async with client(api) as stub:
        call = stub.GenerateStream(ask("slow"))
        await engine.submitted.get()
        tokens = 300  # written without a pause, and less than may be unread
        for index in range(tokens):
            engine.deliver([RequestOutput("slow", (index,), LONG, index)])
            if index % 30 == 0:
                await asyncio.sleep(0.001)
        engine.finish("slow", Finish(FinishReason.EOS))
        deltas = [response.event.delta async for response in call][:-1]
    assert len(deltas) < tokens / 2
    assert sum(delta.num_tokens for delta in deltas) == tokens
    assert "".join(delta.text for delta in deltas) == LONG * tokens


async def test_one_that_does_not_read_is_ended_and_the_others_go_on(
    api: tuple[ApiServer, FakeEngine], engine: FakeEngine
) -> None:
    async with client(api) as stub, client(api) as other:
        idle: Any = stub.GenerateStream(ask("idle"))
        busy = other.GenerateStream(ask("busy"))
        for _ in range(2):
            await engine.submitted.get()
        got = 0

        async def read() -> None:
            nonlocal got
            async for response in busy:
                got += response.event.delta.num_tokens

        reading = asyncio.create_task(read())
        limit = 20 * MAX_UNREAD
        count, longest = await generate(
            engine,
            "idle",
            "busy",
            while_true=lambda count: "idle" in engine.lengths and count < limit,
        )
        assert MAX_UNREAD < count < limit, "the one that does not read is ended, and not at once"
        assert longest < 1.0, "the engine waited for a reader"
        engine.finish("busy", Finish(FinishReason.EOS))
        await asyncio.wait_for(reading, PATIENCE)
        assert got == count, "the other reader has every token"
        # Now it reads: what was sent to it before, in order, and then why there is no more.
        read_late = 0
        with suppress(aio.AioRpcError):
            async for response in idle:
                assert response.event.delta.first_token_index == read_late
                read_late += response.event.delta.num_tokens
        assert await idle.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert 0 < read_late < count
        info = error_details_pb2.ErrorInfo()
        assert (await rpc_status.aio.from_call(idle)).details[0].Unpack(info)
        assert info.reason == "SLOW_READER"
