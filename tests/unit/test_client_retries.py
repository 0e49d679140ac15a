"""When a client tries again, and how it leaves a stream before its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from google.rpc import code_pb2

from mili import client as mili_client
from mili.client import AsyncClient, Client
from mili.v1 import inference_pb2 as pb
from tests.scripted_server import (
    ScriptedServer,
    delta,
    endless,
    fail_first,
    refuse,
    running_server,
)

PATIENCE = 10.0


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with running_server() as scripted:
        yield scripted


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[Client]:
    with Client(server.address, timeout=PATIENCE) as connected:
        yield connected


@pytest.fixture
async def aio_client(server: ScriptedServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address, timeout=PATIENCE) as connected:
        yield connected


# Retries.


@pytest.mark.parametrize("code", [code_pb2.UNAVAILABLE, code_pb2.RESOURCE_EXHAUSTED])
async def test_retried_before_the_first_event(
    server: ScriptedServer, client: Client, aio_client: AsyncClient, code: int
) -> None:
    fail_first(server, code)
    assert list(client.stream("Hi")) == ["Hel", "lo"]
    assert server.calls == 2
    server.calls = 0
    assert (await aio_client.generate("Hi")).text == "Hello"
    assert server.calls == 2


def test_large_request_is_retried_too(server: ScriptedServer, client: Client) -> None:
    fail_first(server, code_pb2.UNAVAILABLE)
    assert client.generate("x" * 15 * 2**20).text == "Hello"
    assert server.calls == 2


def test_retries_end(server: ScriptedServer, client: Client) -> None:
    fail_first(server, code_pb2.UNAVAILABLE, times=100)
    with pytest.raises(mili_client.Unavailable):
        client.generate("Hi")
    assert server.calls == 4


def test_not_retried_after_the_first_event(server: ScriptedServer, client: Client) -> None:
    def events(context: grpc.ServicerContext) -> Iterator[pb.StreamEvent]:
        yield delta("Hel")
        yield from refuse(context, code_pb2.UNAVAILABLE)

    server.events = events
    pieces = iter(client.stream("Hi"))
    assert next(pieces) == "Hel"
    with pytest.raises(mili_client.Unavailable):
        next(pieces)
    assert server.calls == 1


# Leaving early.


def test_leaving_the_loop_cancels(server: ScriptedServer, client: Client) -> None:
    server.events = endless
    stream = client.stream("Hi", timeout=1000)
    for _ in stream:
        break
    assert server.call_ended.wait(PATIENCE)


def test_leaving_the_block_cancels(server: ScriptedServer, client: Client) -> None:
    server.events = endless
    with client.stream("Hi", timeout=1000) as stream:
        pieces = iter(stream)
        next(pieces)
    assert server.call_ended.wait(PATIENCE)
    with pytest.raises(mili_client.Cancelled):
        list(pieces)


def test_close_ends_another_threads_loop(server: ScriptedServer, client: Client) -> None:
    server.events = endless
    stream = client.stream("Hi", timeout=1000)
    threading.Timer(0.05, stream.close).start()
    with pytest.raises(mili_client.Cancelled):
        list(stream)


async def test_aio_leaving_the_loop_cancels(
    server: ScriptedServer, aio_client: AsyncClient
) -> None:
    server.events = endless
    stream = aio_client.stream("Hi", timeout=1000)
    async for _ in stream:
        break
    assert await asyncio.to_thread(server.call_ended.wait, PATIENCE)


async def test_aio_task_cancelled(server: ScriptedServer, aio_client: AsyncClient) -> None:
    server.events = endless

    async def read() -> None:
        async for _ in aio_client.stream("Hi", timeout=1000):
            first_piece.set()

    first_piece = asyncio.Event()
    reader = asyncio.create_task(read())
    await first_piece.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await asyncio.to_thread(server.call_ended.wait, PATIENCE)


async def test_aio_close_ends_another_tasks_loop(
    server: ScriptedServer, aio_client: AsyncClient
) -> None:
    server.events = endless
    stream = aio_client.stream("Hi", timeout=1000)
    asyncio.get_running_loop().call_later(0.05, stream.close)
    with pytest.raises(mili_client.Cancelled):
        _ = [text async for text in stream]


async def test_aio_stream_and_small_calls(aio_client: AsyncClient) -> None:
    stream = aio_client.stream("Hi")
    assert [text async for text in stream] == ["Hel", "lo"]
    assert stream.generation.matched == "END"
    assert await aio_client.cancel("r1") is True
    assert await aio_client.detokenize(await aio_client.tokenize(["ab"])) == ["ab"]
