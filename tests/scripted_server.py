"""A gRPC server that answers as a test scripts it: what clients are tested against.

Knows no engine and no model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_status import rpc_status

from mili.v1 import embedding_pb2, embedding_pb2_grpc, inference_pb2_grpc, model_pb2, model_pb2_grpc
from mili.v1 import inference_pb2 as pb


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


def numbered(events: Iterable[pb.StreamEvent]) -> list[pb.StreamEvent]:
    """The events with the sequence numbers that a real server gives them."""
    for number, event in enumerate(events := list(events), start=1):
        event.sequence = number
    return events


class ScriptedServer(
    inference_pb2_grpc.InferenceServiceServicer,
    model_pb2_grpc.TokenizerServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    embedding_pb2_grpc.EmbeddingServiceServicer,
):
    """`events` makes a call's events, and `attached` those of a call of AttachStream. A unary call
    gets `response`, else all events folded by hand. What was asked is in `requests`, and by whom in
    `tokens`.
    """

    def __init__(self) -> None:
        self.address = ""
        self.calls = 0
        self.requests: list[Message] = []
        self.tokens: list[str] = []
        self.response: pb.GenerateResponse | None = None
        self.call_ended = threading.Event()
        # Set while no stream runs.
        self.all_ended = threading.Event()
        self._running = 0
        self._lock = threading.Lock()
        self.attached: Callable[
            [pb.AttachStreamRequest, grpc.ServicerContext], Iterator[pb.StreamEvent]
        ] = lambda request, _: iter(numbered(whole_stream())[request.after_sequence :])
        self.events: Callable[[grpc.ServicerContext], Iterator[pb.StreamEvent]] = lambda _: iter(
            whole_stream()
        )

    def GenerateStream(  # noqa: N802
        self, request: pb.GenerateStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateStreamResponse]:
        self._note(request, context)
        self._count(1)
        context.add_callback(lambda: self._count(-1))
        for event in self.events(context):
            yield pb.GenerateStreamResponse(event=event)

    def AttachStream(  # noqa: N802
        self, request: pb.AttachStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.AttachStreamResponse]:
        self._note(request, context)
        for event in self.attached(request, context):
            yield pb.AttachStreamResponse(event=event)

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> pb.GenerateResponse:
        self._note(request, context)
        context.add_callback(self.call_ended.set)
        events = list(self.events(context))
        if self.response is not None:
            return self.response
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

    def Embed(  # noqa: N802
        self, request: embedding_pb2.EmbedRequest, context: grpc.ServicerContext
    ) -> embedding_pb2.EmbedResponse:
        self._note(request, context)
        vectors = [
            embedding_pb2.Embedding(values=[len(item.text) + len(item.token_ids.ids), 0.5])
            for item in request.inputs
        ]
        return embedding_pb2.EmbedResponse(embeddings=vectors, usage=pb.Usage(prompt_tokens=9))

    def Score(  # noqa: N802
        self, request: embedding_pb2.ScoreRequest, context: grpc.ServicerContext
    ) -> embedding_pb2.ScoreResponse:
        self._note(request, context)
        scores = [
            embedding_pb2.Score(logprob=-0.5, num_tokens=len(item.token_ids.ids), is_greedy=True)
            for item in request.continuations
        ]
        return embedding_pb2.ScoreResponse(scores=scores, usage=pb.Usage(prompt_tokens=9))

    def ListModels(  # noqa: N802
        self, request: model_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> model_pb2.ListModelsResponse:
        self._note(request, context)
        return model_pb2.ListModelsResponse(models=[model_pb2.Model(name="m", aliases=["other"])])

    def GetModel(  # noqa: N802
        self, request: model_pb2.GetModelRequest, context: grpc.ServicerContext
    ) -> model_pb2.GetModelResponse:
        self._note(request, context)
        if request.name not in ("m", "other"):
            list(refuse(context, grpc.StatusCode.NOT_FOUND.value[0]))
        return model_pb2.GetModelResponse(model=model_pb2.Model(name="m", aliases=["other"]))

    def _count(self, change: int) -> None:
        with self._lock:
            self._running += change
            (self.call_ended.set if change < 0 else self.all_ended.clear)()
            if not self._running:
                self.all_ended.set()

    def _note(self, request: Message, context: grpc.ServicerContext) -> None:
        self.calls += 1
        self.requests.append(request)
        self.tokens.append(dict(context.invocation_metadata()).get("authorization", ""))

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
        model_pb2_grpc.add_ModelServiceServicer_to_server(servicer, grpc_server)
        embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(servicer, grpc_server)
        servicer.address = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
        grpc_server.start()
        yield servicer
        grpc_server.stop(None).wait()
