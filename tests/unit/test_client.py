"""What a client's calls give back, and which errors they raise."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2

from mili import client as mili_client
from mili.client import AsyncClient, Client, MiliError, Score
from mili.v1 import embedding_pb2
from mili.v1 import inference_pb2 as pb
from tests.scripted_server import (
    ScriptedServer,
    delta,
    endless,
    finished,
    refuse,
    running_server,
    started,
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


def test_generate(client: Client) -> None:
    result = client.generate("Hi", request_id="mine")
    assert (result.text, result.token_ids, result.request_id) == ("Hello", (1, 2, 3), "mine")
    assert (result.finish_reason, result.matched) == ("stop_sequence", "END")
    assert result.usage.cached_prompt_tokens == 1


def test_stream_gives_text_then_the_result(client: Client) -> None:
    stream = client.stream("Hi")
    with pytest.raises(RuntimeError):
        _ = stream.finish_reason
    assert list(stream) == ["Hel", "lo"]
    assert (stream.finish_reason, stream.usage.completion_tokens) == ("stop_sequence", 2)
    assert (stream.generation.text, stream.generation.token_ids) == ("Hello", (1, 2, 3))
    assert (stream.generation.seed, stream.request_id) == (7, "r1")


def test_events(client: Client) -> None:
    assert [event.WhichOneof("event") for event in client.stream("Hi").events()] == [
        "started", "delta", "delta", "delta", "finished",
    ]  # fmt: skip


def test_slow_stream_gives_each_piece_at_once(server: ScriptedServer, client: Client) -> None:
    first_piece_read = threading.Event()

    def events(_: grpc.ServicerContext) -> Iterator[pb.StreamEvent]:
        yield delta("first")
        assert first_piece_read.wait(PATIENCE)
        yield from (delta("second"), finished())

    server.events = events
    pieces = iter(client.stream("Hi"))
    assert next(pieces) == "first"
    first_piece_read.set()
    assert list(pieces) == ["second"]


def test_small_calls(client: Client) -> None:
    assert client.cancel("r1") is True
    assert client.cancel("other") is False
    assert client.tokenize(["ab", ""]) == [[97, 98], []]
    assert client.detokenize([[97], [98, 99]]) == ["a", "bc"]


def test_vectors_scores_and_models(server: ScriptedServer, client: Client) -> None:
    result = client.embed(["abc", [1, 2]], model="m", dimensions=2, normalize=False)
    assert (result.vectors, result.usage.prompt_tokens) == (((3.0, 0.5), (2.0, 0.5)), 9)
    asked = embedding_pb2.EmbedRequest(
        model="m",
        inputs=[
            embedding_pb2.EmbedInput(text="abc"),
            embedding_pb2.EmbedInput(token_ids=pb.TokenIds(ids=[1, 2])),
        ],
        dimensions=2,
        normalize=False,
    )
    assert server.requests == [asked]
    assert client.score("a", [[1, 2, 3]]).scores == (Score(-0.5, 3, True),)
    assert [model.name for model in client.models()] == ["m"]
    assert client.model("other").name == "m"
    with pytest.raises(mili_client.NotFound):
        client.model("none")


async def test_aio_vectors_scores_and_tenants(
    server: ScriptedServer, aio_client: AsyncClient
) -> None:
    assert (await aio_client.embed(["abc"])).vectors == ((3.0, 0.5),)
    tenant = aio_client.with_token("secret")
    assert (await tenant.score("a", ["b"])).scores == (Score(-0.5, 0, True),)
    assert (await aio_client.model("m")).name == "m"
    assert server.tokens == ["", "Bearer secret", ""]


# Errors.


def test_error_details(server: ScriptedServer, client: Client) -> None:
    server.events = lambda context: refuse(
        context,
        code_pb2.INVALID_ARGUMENT,
        error_details_pb2.ErrorInfo(reason="INVALID_FIELD", domain="mili"),
        error_details_pb2.BadRequest(
            field_violations=[error_details_pb2.BadRequest.FieldViolation(field="a.top_p")]
        ),
    )
    for call in (lambda: client.generate("Hi"), lambda: list(client.stream("Hi"))):
        with pytest.raises(mili_client.InvalidRequest, match="no") as caught:
            call()
        assert (caught.value.reason, caught.value.field) == ("INVALID_FIELD", "a.top_p")
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.__cause__ is None


def test_time_to_retry(server: ScriptedServer, client: Client) -> None:
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(1500)
    info = error_details_pb2.ErrorInfo(reason="QUEUE_FULL")
    server.events = lambda context: refuse(
        context, code_pb2.RESOURCE_EXHAUSTED, info, retry, pushback_ms=-1
    )
    with pytest.raises(mili_client.Overloaded) as caught:
        client.generate("Hi")
    assert (caught.value.reason, caught.value.retry_after) == ("QUEUE_FULL", 1.5)
    assert server.calls == 1


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (code_pb2.NOT_FOUND, mili_client.NotFound),
        (code_pb2.ALREADY_EXISTS, mili_client.InvalidRequest),
        (code_pb2.CANCELLED, mili_client.Cancelled),
        (code_pb2.DEADLINE_EXCEEDED, mili_client.DeadlineExceeded),
        (code_pb2.INTERNAL, mili_client.ServerError),
        (code_pb2.PERMISSION_DENIED, mili_client.NotAllowed),
        (code_pb2.UNAUTHENTICATED, mili_client.NotAllowed),
        (code_pb2.FAILED_PRECONDITION, MiliError),
    ],
)
async def test_error_types(
    server: ScriptedServer, client: Client, aio_client: AsyncClient, code: int, error: type
) -> None:
    server.events = lambda context: refuse(context, code)
    with pytest.raises(MiliError) as caught:
        client.generate("Hi")
    assert type(caught.value) is error
    with pytest.raises(MiliError) as caught:
        await aio_client.generate("Hi")
    assert type(caught.value) is error
    with pytest.raises(MiliError) as caught:
        _ = [text async for text in aio_client.stream("Hi")]
    assert type(caught.value) is error


def test_failed_sequence(server: ScriptedServer, client: Client) -> None:
    error = pb.Error(code=code_pb2.INTERNAL, reason="NUMERIC_FAULT", message="NaN")
    end = pb.Finished(finish_reason=pb.FINISH_REASON_ERROR, error=error)
    server.events = lambda _: iter([delta("Hel"), pb.StreamEvent(finished=end)])
    for call in (lambda: client.generate("Hi"), lambda: list(client.stream("Hi"))):
        with pytest.raises(mili_client.ServerError, match="NaN") as caught:
            call()
        assert caught.value.reason == "NUMERIC_FAULT"


def test_stream_without_its_end_is_an_error(server: ScriptedServer, client: Client) -> None:
    server.events = lambda _: iter([started(), delta("Hel")])
    with pytest.raises(mili_client.ServerError):
        list(client.stream("Hi"))


def test_timeout(server: ScriptedServer, client: Client) -> None:
    server.events = endless
    with pytest.raises(mili_client.DeadlineExceeded):
        list(client.stream("Hi", timeout=0.1))


def test_unreachable() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(mili_client.Unavailable):
        client.generate("Hi")


def test_too_large(server: ScriptedServer, client: Client) -> None:
    with pytest.raises(mili_client.InvalidRequest, match="larger than max"):
        client.generate("x" * 17 * 2**20)
    assert server.calls == 0
