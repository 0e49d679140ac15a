"""The client for ordinary code: every call blocks, and a stream is a loop.

Owns the channel. What goes over it is made in requests.py and read in results.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self, TypeVar, Unpack

import grpc

from mili.client.channel import OPTIONS, authorization
from mili.client.errors import translated_errors
from mili.client.requests import Message, Options, Prompt, build_chat, build_generation
from mili.client.results import Generation, PartialGeneration, RenderedChat, from_response
from mili.v1 import inference_pb2, model_pb2
from mili.v1.inference_pb2_grpc import InferenceServiceStub
from mili.v1.model_pb2_grpc import ModelServiceStub, TokenizerServiceStub

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class TextStream(PartialGeneration):
    """Text as it is generated: iterate over it.

    Leaving the loop early, `close`, and the end of a `with` block cancel the generation. After
    the last piece, `finish_reason`, `usage` and the whole `generation` are there.
    """

    def __init__(self, call: grpc._CallIterator[inference_pb2.GenerateStreamResponse]) -> None:
        super().__init__()
        self._call = call

    def __iter__(self) -> Iterator[str]:
        for event in self.events():
            if event.delta.text:
                yield event.delta.text

    def events(self) -> Iterator[inference_pb2.StreamEvent]:
        """The events themselves, for callers that want token ids or times beside the text."""
        try:
            with translated_errors():
                for response in self._call:
                    self.push(response.event)
                    yield response.event
            self.check_finished()
        finally:
            self.close()

    def close(self) -> None:
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client:
    """A connection to one MILI server. Threads may share it.

    address: "host:port". timeout: seconds that a call may take, unless the call says otherwise;
    None for no limit. token: a tenant's bearer token, where the server wants one.
    credentials: for TLS, as from grpc.ssl_channel_credentials().
    Every call raises MiliError.
    """

    def __init__(
        self,
        address: str = "localhost:50051",
        *,
        timeout: float | None = None,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._timeout = timeout
        self._metadata = authorization(token)
        if credentials is None:
            self._channel = grpc.insecure_channel(address, OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, credentials, OPTIONS)
        self._inference = InferenceServiceStub(self._channel)
        self._models = ModelServiceStub(self._channel)
        self._tokenizer = TokenizerServiceStub(self._channel)

    def close(self) -> None:
        """Cancel what is under way."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        request_id: str = "",
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """Generate from a prompt (text or token ids), or from `messages`; wait for the whole."""
        request = inference_pb2.GenerateRequest(
            request_id=request_id, generation=build_generation(prompt, options)
        )
        return from_response(self._call(self._inference.Generate, request, timeout))

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        request_id: str = "",
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> TextStream:
        """Like `generate`, but text comes as it is made. Errors come with the first piece."""
        request = inference_pb2.GenerateStreamRequest(
            request_id=request_id, generation=build_generation(prompt, options)
        )
        return TextStream(
            self._inference.GenerateStream(
                request, timeout=self._deadline(timeout), metadata=self._metadata
            )
        )

    def cancel(self, request_id: str) -> bool:
        """End another call's generation; False if it had already ended."""
        request = inference_pb2.CancelGenerationRequest(request_id=request_id)
        return self._call(self._inference.CancelGeneration, request).cancelled

    def models(self) -> list[model_pb2.Model]:
        """What is served, and with which limits."""
        request = model_pb2.ListModelsRequest()
        return list(self._call(self._models.ListModels, request).models)

    def tokenize(self, texts: Sequence[str], *, model: str = "") -> list[list[int]]:
        request = model_pb2.TokenizeRequest(model=model, texts=texts)
        results = self._call(self._tokenizer.Tokenize, request).results
        return [list(result.ids) for result in results]

    def detokenize(self, token_ids: Sequence[Sequence[int]], *, model: str = "") -> list[str]:
        request = model_pb2.DetokenizeRequest(
            model=model, token_ids=[inference_pb2.TokenIds(ids=ids) for ids in token_ids]
        )
        return list(self._call(self._tokenizer.Detokenize, request).texts)

    def render_chat(self, messages: Sequence[Message], *, model: str = "") -> RenderedChat:
        """Apply the model's chat template without generating."""
        request = model_pb2.RenderChatRequest(model=model, chat=build_chat(messages, None))
        response = self._call(self._tokenizer.RenderChat, request)
        return RenderedChat(response.text, tuple(response.token_ids))

    def _call(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout: float | None = None,
    ) -> _Response:
        with translated_errors():
            return method(request, timeout=self._deadline(timeout), metadata=self._metadata)

    def _deadline(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else timeout
