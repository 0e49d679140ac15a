"""Bad requests to a real server: a named status each, and a stream beside them that goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from mili.v1 import inference_pb2 as pb
from mili.v1.inference_pb2_grpc import InferenceServiceStub
from tests.bystander import Bystander
from tests.model_folders import make_model_folder
from tests.serving import STEADY, Served, serving
from tests.streams import PATIENCE, Job

SERVICE = "/mili.v1.InferenceService/"
# 32 blocks of 16 tokens beside the null block: less than the model itself could take.
NUM_BLOCKS = 33
CONTEXT_LIMIT = 512
VOCAB_SIZE = 320
INVALID = grpc.StatusCode.INVALID_ARGUMENT
NAN = float("nan")

Refusal = tuple[grpc.StatusCode, str, str]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("bad_input")
    model = make_model_folder(folder / "tiny", vocab_size=VOCAB_SIZE)
    blocks = f"--num-gpu-blocks-override={NUM_BLOCKS}"
    with serving(model, folder / "log", blocks, MILI_LOG_FORMAT="json", **STEADY) as served:
        yield served
    events = [json.loads(line) for line in served.log.read_text().splitlines()]
    assert not [event for event in events if event["level"] in ("error", "critical")]


@pytest.fixture(scope="module")
def channel(served: Served) -> Iterator[grpc.Channel]:
    options = (("grpc.enable_retries", 0), ("grpc.max_send_message_length", -1))
    with grpc.insecure_channel(served.address, options) as channel:
        yield channel


@pytest.fixture(scope="module")
def bystander(served: Served) -> Iterator[Bystander]:
    with Bystander(served.address, Job(tuple(range(100, 120)), max_tokens=80)) as bystander:
        yield bystander


@pytest.fixture(autouse=True)
def undisturbed(bystander: Bystander) -> Iterator[None]:
    """A stream runs before, during and after every test of this file."""
    bystander.advance()
    yield
    bystander.advance()


def refusal(call: Callable[[], object]) -> Refusal:
    """The code of a call that fails, the ErrorInfo's reason, and the field of the BadRequest."""
    with pytest.raises(grpc.RpcError) as failure:
        call()
    status = rpc_status.from_call(failure.value)
    assert status is not None, f"no details: {failure.value}"
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    assert info.domain == "mili"
    fields = [violation.field for violation in bad.field_violations]
    return failure.value.code(), info.reason, ",".join(fields)


def generate(channel: grpc.Channel, generation: pb.Generation) -> pb.GenerateResponse:
    request = pb.GenerateRequest(generation=generation)
    return InferenceServiceStub(channel).Generate(request, timeout=PATIENCE)


def stream(channel: grpc.Channel, generation: pb.Generation) -> list[pb.GenerateStreamResponse]:
    request = pb.GenerateStreamRequest(generation=generation)
    return list(InferenceServiceStub(channel).GenerateStream(request, timeout=PATIENCE))


def ids(count: int, value: int = 1) -> pb.Generation:
    return pb.Generation(token_ids=pb.TokenIds(ids=[value] * count))


def sampled(**fields: Any) -> pb.Generation:  # noqa: ANN401
    return pb.Generation(text="x", sampling=pb.SamplingParams(**fields))


def chat(*roles: str) -> pb.Generation:
    messages = [pb.ChatMessage(role=role, content="x") for role in roles]
    return pb.Generation(chat=pb.ChatPrompt(messages=messages))


def stops(*texts: str) -> pb.Generation:
    return pb.Generation(text="x", stopping=pb.StopConditions(stop_sequences=texts))


BAD: dict[str, tuple[Callable[[], pb.Generation], str, str]] = {
    "no prompt": (lambda: pb.Generation(), "INVALID_FIELD", "prompt"),
    "empty text": (lambda: pb.Generation(text=""), "INVALID_FIELD", "text"),
    "no ids": (lambda: ids(0), "INVALID_FIELD", "token_ids"),
    "no messages": (lambda: chat(), "INVALID_FIELD", "chat"),
    "limit": (lambda: ids(CONTEXT_LIMIT), "CONTEXT_TOO_LONG", "token_ids"),
    "limit, as text": (lambda: pb.Generation(text="x" * 512), "CONTEXT_TOO_LONG", "text"),
    "ten pools": (lambda: ids(CONTEXT_LIMIT * 10), "CONTEXT_TOO_LONG", "token_ids"),
    "ten pools, as text": (lambda: pb.Generation(text="x" * 5120), "CONTEXT_TOO_LONG", "text"),
    "nan": (lambda: sampled(temperature=NAN), "INVALID_FIELD", "sampling.temperature"),
    "negative": (lambda: sampled(temperature=-1), "INVALID_FIELD", "sampling.temperature"),
    "top_p 0": (lambda: sampled(top_p=0), "INVALID_FIELD", "sampling.top_p"),
    "top_p 2": (lambda: sampled(top_p=2), "INVALID_FIELD", "sampling.top_p"),
    "a million stops": (
        lambda: stops(*["x"] * 1_000_000),
        "INVALID_FIELD",
        "stopping.stop_sequences",
    ),
    "empty stop": (lambda: stops("x", ""), "INVALID_FIELD", "stopping.stop_sequences[1]"),
    "id out of range": (lambda: ids(3, VOCAB_SIZE), "INVALID_FIELD", "token_ids"),
    "largest id": (lambda: ids(3, 2**32 - 1), "INVALID_FIELD", "token_ids"),
    "role": (lambda: chat("user", "wizard"), "INVALID_FIELD", "chat.messages[1].role"),
    "logit_bias": (
        lambda: sampled(logit_bias={1: 1.0, 2: 1000.0}),
        "INVALID_FIELD",
        "sampling.logit_bias[2]",
    ),
    "num_sequences": (
        lambda: sampled(num_sequences=129),
        "INVALID_FIELD",
        "sampling.num_sequences",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_generation(channel: grpc.Channel, name: str) -> None:
    make, reason, field = BAD[name]
    expected = (INVALID, reason, f"generation.{field}")
    assert refusal(lambda: generate(channel, make())) == expected
    assert refusal(lambda: stream(channel, make())) == expected


def test_an_unknown_model(channel: grpc.Channel) -> None:
    expected = (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "generation.model")
    generation = pb.Generation(model="no-such-model", text="x")
    assert refusal(lambda: generate(channel, generation)) == expected
    assert refusal(lambda: stream(channel, generation)) == expected


def test_the_longest_prompt_is_answered(channel: grpc.Channel) -> None:
    """One token short of the limit, with every block of the pool."""
    response = generate(channel, ids(CONTEXT_LIMIT - 1))
    assert response.usage.prompt_tokens == CONTEXT_LIMIT - 1
    assert response.usage.completion_tokens == 1
    assert response.sequences[0].finish_reason == pb.FINISH_REASON_CONTEXT_LENGTH


@pytest.mark.parametrize("method", ["Generate", "GenerateStream", "CancelGeneration"])
@pytest.mark.parametrize("message", [b"\xff" * 1000, b"\x0a\x02\xff\xfe"], ids=["wire", "utf-8"])
def test_bytes_that_are_no_request(channel: grpc.Channel, method: str, message: bytes) -> None:
    if method == "GenerateStream":
        call = channel.unary_stream(SERVICE + method)
        failed = refusal(lambda: list(call(message, timeout=PATIENCE)))
    else:
        whole = channel.unary_unary(SERVICE + method)
        failed = refusal(lambda: whole(message, timeout=PATIENCE))
    assert failed == (INVALID, "INVALID_FIELD", "")


def test_a_17_mb_message(channel: grpc.Channel) -> None:
    """The one refusal without a reason of ours: gRPC itself says it."""
    with pytest.raises(grpc.RpcError, match="larger than max") as failure:
        generate(channel, pb.Generation(text="x" * 17_000_000))
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_deadline_shorter_than_the_generation(channel: grpc.Channel) -> None:
    generation = pb.Generation(text="x", stopping=pb.StopConditions(ignore_eos=True))
    call = InferenceServiceStub(channel).GenerateStream(
        pb.GenerateStreamRequest(request_id="late", generation=generation), timeout=0.05
    )
    with pytest.raises(grpc.RpcError) as failure:
        list(call)
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    # The server has let go of it: its id is free, and all of the pool can be had.
    test_the_longest_prompt_is_answered(channel)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00" * 100_000,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 1000,
    ],
    ids=["zeros", "http1", "tls", "http2"],
)
def test_garbage_on_the_grpc_port(served: Served, garbage: bytes) -> None:
    host, port = served.address.split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as connection:
        try:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
        except TimeoutError:
            pytest.fail("the server keeps the connection")
        except OSError:
            pass  # it hung up before it had heard everything
