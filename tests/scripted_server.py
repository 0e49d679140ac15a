"""A gRPC server that answers as a test scripts it: what clients are tested against.

Knows no engine and no model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from google.protobuf import any_pb2
from google.rpc import status_pb2
from grpc_status import rpc_status

from mili.v1 import inference_pb2 as pb
from mili.v1 import inference_pb2_grpc, model_pb2, model_pb2_grpc


def started() -> pb.StreamEvent:
    return pb.StreamEvent(started=pb.Started(prompt_tokens=3, seed=7, model="m", request_id="r1"))


def delta(text: str, *token_ids: int) -> pb.StreamEvent:
    return pb.StreamEvent(delta=pb.Delta(text=text, token_ids=token_ids))


def finished() -> pb.StreamEvent:
    return pb.StreamEvent(
        finished=pb.Finished(
            finish_reason=pb.FINISH_REASON_STOP_SEQUENCE,
            stop_sequence="END",
            usage=pb.Usage(prompt_tokens=3, cached_prompt_tokens=1, completion_tokens=2),
        )
    )


def whole_stream() -> list[pb.StreamEvent]:
    return [started(), delta("Hel", 1), delta("", 2), delta("lo", 3), finished()]


class ScriptedServer(
    inference_pb2_grpc.InferenceServiceServicer, model_pb2_grpc.TokenizerServiceServicer
):
    """`events` makes a call's events; a unary call gets all of them folded by hand."""

    def __init__(self) -> None:
        self.address = ""
        self.calls = 0
        self.call_ended = threading.Event()
        self.events: Callable[[grpc.ServicerContext], Iterator[pb.StreamEvent]] = lambda _: iter(
            whole_stream()
        )

    def GenerateStream(  # noqa: N802
        self, request: pb.GenerateStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateStreamResponse]:
        self.calls += 1
        context.add_callback(self.call_ended.set)
        for event in self.events(context):
            yield pb.GenerateStreamResponse(event=event)

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> pb.GenerateResponse:
        self.calls += 1
        events = list(self.events(context))
        end = events[-1].finished
        return pb.GenerateResponse(
            request_id=request.request_id,
            usage=end.usage,
            sequences=[
                pb.GeneratedSequence(
                    text="".join(event.delta.text for event in events),
                    token_ids=[i for event in events for i in event.delta.token_ids],
                    finish_reason=end.finish_reason,
                    stop_sequence=end.stop_sequence,
                    error=end.error,
                )
            ],
        )

    def CancelGeneration(  # noqa: N802
        self, request: pb.CancelGenerationRequest, context: grpc.ServicerContext
    ) -> pb.CancelGenerationResponse:
        return pb.CancelGenerationResponse(cancelled=request.request_id == "r1")

    def Tokenize(  # noqa: N802
        self, request: model_pb2.TokenizeRequest, context: grpc.ServicerContext
    ) -> model_pb2.TokenizeResponse:
        tokenized = [model_pb2.TokenizedText(ids=text.encode()) for text in request.texts]
        return model_pb2.TokenizeResponse(results=tokenized)

    def Detokenize(  # noqa: N802
        self, request: model_pb2.DetokenizeRequest, context: grpc.ServicerContext
    ) -> model_pb2.DetokenizeResponse:
        return model_pb2.DetokenizeResponse(
            texts=[bytes(t.ids).decode() for t in request.token_ids]
        )


def refuse(
    context: grpc.ServicerContext, code: int, *details: object, pushback_ms: int | None = None
) -> Iterator[pb.StreamEvent]:
    """End the call with a rich status."""
    status = status_pb2.Status(code=code, message="no")
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    rich = rpc_status.to_status(status)
    pushback = () if pushback_ms is None else (("grpc-retry-pushback-ms", str(pushback_ms)),)
    context.set_trailing_metadata((*rich.trailing_metadata, *pushback))
    context.abort(rich.code, rich.details)
    yield  # makes this a generator, as the other scripts are


def fail_first(server: ScriptedServer, code: int, times: int = 1) -> None:
    def events(context: grpc.ServicerContext) -> Iterator[pb.StreamEvent]:
        if server.calls <= times:
            yield from refuse(context, code, pushback_ms=1)
        yield from whole_stream()

    server.events = events


def endless(context: grpc.ServicerContext) -> Iterator[pb.StreamEvent]:
    yield started()
    while context.is_active():
        yield delta("x", 1)


@contextmanager
def running_server() -> Iterator[ScriptedServer]:
    with ThreadPoolExecutor(8) as threads:
        servicer = ScriptedServer()
        grpc_server = grpc.server(threads, options=[("grpc.max_receive_message_length", 2**24)])
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, grpc_server)
        model_pb2_grpc.add_TokenizerServiceServicer_to_server(servicer, grpc_server)
        servicer.address = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
        grpc_server.start()
        yield servicer
        grpc_server.stop(None).wait()
