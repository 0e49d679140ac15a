"""A stream whose connection is lost, and which goes on: nothing twice, nothing missing."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2

from mili.client import AsyncClient, Client, MiliError, NotFound, Overloaded, Unavailable
from mili.client.resume import Resumption
from mili.v1 import inference_pb2 as pb
from tests.scripted_server import (
    ScriptedServer,
    delta,
    finished,
    numbered,
    refuse,
    running_server,
)

PATIENCE = 10.0
TEXT = "The quick brown fox"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with running_server() as scripted:
        yield scripted


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[Client]:
    with Client(server.address, timeout=PATIENCE, retries=False) as connected:
        yield connected


@pytest.fixture
async def aio_client(server: ScriptedServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address, timeout=PATIENCE, retries=False) as connected:
        yield connected


def resumable() -> list[pb.StreamEvent]:
    started = pb.StreamEvent(started=pb.Started(request_id="r1", resume_token="secret"))
    return numbered([started, *(delta(letter) for letter in TEXT), finished()])


def cut_at_random(server: ScriptedServer, chance: random.Random) -> None:
    """Lose every connection after a few events, and let some of them come again."""

    def some(after: int, context: grpc.ServicerContext) -> Iterator[pb.StreamEvent]:
        events = resumable()[max(0, after - chance.randint(0, 2)) :]
        count = chance.randint(1, 8)
        yield from events[:count]
        if count < len(events):
            yield from refuse(context, code_pb2.UNAVAILABLE)

    server.events = lambda context: some(0, context)
    server.attached = lambda request, context: some(request.after_sequence, context)


@pytest.mark.parametrize("seed", range(10))
def test_cut_anywhere(server: ScriptedServer, client: Client, seed: int) -> None:
    cut_at_random(server, random.Random(seed))
    stream = client.stream("Hi", resume_window=60)
    assert "".join(stream) == TEXT
    assert stream.generation.text == TEXT
    assert stream.last_sequence == len(TEXT) + 2
    assert server.calls > 2
    for request in server.requests[1:]:
        assert isinstance(request, pb.AttachStreamRequest)
        assert request.resume_token == "secret"


@pytest.mark.parametrize("seed", range(10, 14))
async def test_aio_cut_anywhere(server: ScriptedServer, aio_client: AsyncClient, seed: int) -> None:
    cut_at_random(server, random.Random(seed))
    stream = aio_client.stream("Hi", resume_window=60)
    numbers = [event.sequence async for event in stream.events()]
    assert numbers == list(range(1, len(TEXT) + 3))
    assert stream.generation.text == TEXT
    assert server.calls > 2


def test_another_process_goes_on(server: ScriptedServer, client: Client) -> None:
    server.attached = lambda request, _: iter(resumable()[request.after_sequence :])
    stream = client.attach("secret", after_sequence=5)
    assert "".join(stream) == TEXT[4:]
    assert stream.finish_reason == "stop_sequence"


async def test_aio_another_process_goes_on(server: ScriptedServer, aio_client: AsyncClient) -> None:
    server.attached = lambda request, _: iter(resumable()[request.after_sequence :])
    assert "".join([text async for text in aio_client.attach("secret")]) == TEXT


def test_without_a_window_a_loss_is_final(server: ScriptedServer, client: Client) -> None:
    cut_at_random(server, random.Random(1))
    with pytest.raises(Unavailable):
        list(client.stream("Hi"))
    assert server.calls == 1


def test_what_the_server_says_is_final(server: ScriptedServer, client: Client) -> None:
    def lost(context: grpc.ServicerContext) -> Iterator[pb.StreamEvent]:
        yield from resumable()[:3]
        info = error_details_pb2.ErrorInfo(reason="WORKER_LOST", domain="mili")
        yield from refuse(context, code_pb2.UNAVAILABLE, info)

    server.events = lost
    with pytest.raises(Unavailable):
        list(client.stream("Hi", resume_window=60))
    assert server.calls == 1


def test_a_slow_reader_goes_on(server: ScriptedServer, client: Client) -> None:
    def slow(context: grpc.ServicerContext) -> Iterator[pb.StreamEvent]:
        yield from resumable()[:3]
        info = error_details_pb2.ErrorInfo(reason="SLOW_READER", domain="mili")
        yield from refuse(context, code_pb2.RESOURCE_EXHAUSTED, info)

    server.events = slow
    server.attached = lambda request, _: iter(resumable()[request.after_sequence :])
    assert "".join(client.stream("Hi", resume_window=60)) == TEXT
    with pytest.raises(Overloaded):
        list(client.stream("Hi"))


def test_a_stream_that_is_gone(server: ScriptedServer, client: Client) -> None:
    cut_at_random(server, random.Random(1))
    server.attached = lambda _, context: refuse(context, code_pb2.NOT_FOUND)
    with pytest.raises(NotFound):
        list(client.stream("Hi", resume_window=60))


def test_the_window_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delays grow, and no try comes after the window; a new event begins a new one."""
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lost = MiliError(grpc.StatusCode.UNAVAILABLE, "lost")

    def delays() -> list[float]:
        nonlocal now
        found: list[float] = []
        with contextlib.suppress(MiliError):
            while True:
                found.append(resumption.delay(lost))
                now += found[-1]
        return found

    resumption = Resumption(3.0, "secret")
    assert delays() == [0.0, 0.1, 0.2, 0.4, 0.8]
    assert resumption.takes(pb.StreamEvent(sequence=1))
    assert delays() == [0.0, 0.1, 0.2, 0.4, 0.8]
