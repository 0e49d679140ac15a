"""The client for asyncio: the same calls as sync.py, awaited.

Owns the channel. What goes over it is made in requests.py and read in responses.py; streams.py
reads streams.
"""
# ruff: noqa: ASYNC109  (a timeout is gRPC's deadline here, which the server is told)

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Self, TypeVar, Unpack

import grpc

from mili.client.channel import authorization, channel_options
from mili.client.errors import translated_errors
from mili.client.options import ChatOptions, Message, Options, Prompt, StreamOptions
from mili.client.requests import (
    build_chat,
    build_generation,
    build_inputs,
    build_stream_request,
    response_model,
)
from mili.client.responses import from_embed_response, from_response, from_score_response
from mili.client.results import Embeddings, Generation, RenderedChat, Scores
from mili.client.resume import Resumption
from mili.client.streams import AsyncTextStream
from mili.v1 import embedding_pb2, inference_pb2, model_pb2
from mili.v1.embedding_pb2_grpc import EmbeddingServiceStub
from mili.v1.inference_pb2_grpc import InferenceServiceStub
from mili.v1.model_pb2_grpc import ModelServiceStub, TokenizerServiceStub

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_AttachCall = grpc.aio.UnaryStreamCall[
    inference_pb2.AttachStreamRequest, inference_pb2.AttachStreamResponse
]


class AsyncClient:
    """A connection to one MILI server, made inside a running event loop.

    address: "host:port". timeout: seconds that a call may take, unless the call says otherwise;
    None for no limit. token: a tenant's bearer token, where the server wants one.
    credentials: for TLS, as from grpc.ssl_channel_credentials(). retries: try again, a few times
    and as late as the server says, where nothing was generated yet.
    Every call raises MiliError.
    """

    def __init__(
        self,
        address: str = "localhost:50051",
        *,
        timeout: float | None = None,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        retries: bool = True,
    ) -> None:
        options = channel_options(retries)
        self._timeout = timeout
        self._metadata = authorization(token)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options)
        self._inference = InferenceServiceStub(self._channel)
        self._models = ModelServiceStub(self._channel)
        self._tokenizer = TokenizerServiceStub(self._channel)
        self._embedding = EmbeddingServiceStub(self._channel)

    async def close(self) -> None:
        """Cancel what is under way."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def generate(
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
        response = await self._call(self._inference.Generate, request, timeout)
        return from_response(response, response_model(options))

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        request_id: str = "",
        timeout: float | None = None,
        **options: Unpack[StreamOptions],
    ) -> AsyncTextStream:
        """Like `generate`, but text comes as it is made. Errors come with the first piece."""
        request = build_stream_request(prompt, options, request_id)
        start = self._inference.GenerateStream
        deadline = self._deadline(timeout)
        return AsyncTextStream(
            start(request, timeout=deadline, metadata=self._metadata),
            self._attacher(deadline),
            Resumption(options.get("resume_window")),
            response_model(options),
        )

    def attach(
        self,
        resume_token: str,
        *,
        after_sequence: int = 0,
        resume_window: float | None = None,
        timeout: float | None = None,
    ) -> AsyncTextStream:
        """Go on with the stream of an earlier call, perhaps another process's, that had a
        resume_window: the events after number after_sequence. What is folded from them lacks what
        came before. resume_window: seconds in which a lost connection is taken up again."""
        resumption = Resumption(resume_window, resume_token, after_sequence)
        attach = self._attacher(self._deadline(timeout))
        return AsyncTextStream(attach(resumption.request()), attach, resumption)

    async def cancel(self, request_id: str) -> bool:
        """End another call's generation; False if it had already ended."""
        request = inference_pb2.CancelGenerationRequest(request_id=request_id)
        return (await self._call(self._inference.CancelGeneration, request)).cancelled

    async def embed(
        self,
        inputs: Sequence[Prompt],
        *,
        model: str = "",
        dimensions: int | None = None,
        normalize: bool | None = None,
        timeout: float | None = None,
    ) -> Embeddings:
        """A vector for each text (or list of token ids); dimensions: only the first so many."""
        request = embedding_pb2.EmbedRequest(
            model=model, inputs=build_inputs(inputs), normalize=normalize, dimensions=dimensions
        )
        return from_embed_response(await self._call(self._embedding.Embed, request, timeout))

    async def score(
        self,
        context: Prompt,
        continuations: Sequence[Prompt],
        *,
        model: str = "",
        timeout: float | None = None,
    ) -> Scores:
        """How likely the model finds each continuation after the context."""
        (start,) = build_inputs([context])
        request = embedding_pb2.ScoreRequest(
            model=model, context=start, continuations=build_inputs(continuations)
        )
        return from_score_response(await self._call(self._embedding.Score, request, timeout))

    async def models(self) -> list[model_pb2.Model]:
        """What is served, and with which limits."""
        request = model_pb2.ListModelsRequest()
        return list((await self._call(self._models.ListModels, request)).models)

    async def model(self, name: str) -> model_pb2.Model:
        """The model of a name, or of another name of it."""
        request = model_pb2.GetModelRequest(name=name)
        return (await self._call(self._models.GetModel, request)).model

    async def tokenize(self, texts: Sequence[str], *, model: str = "") -> list[list[int]]:
        request = model_pb2.TokenizeRequest(model=model, texts=texts)
        response = await self._call(self._tokenizer.Tokenize, request)
        return [list(result.ids) for result in response.results]

    async def detokenize(self, token_ids: Sequence[Sequence[int]], *, model: str = "") -> list[str]:
        request = model_pb2.DetokenizeRequest(
            model=model, token_ids=[inference_pb2.TokenIds(ids=ids) for ids in token_ids]
        )
        return list((await self._call(self._tokenizer.Detokenize, request)).texts)

    async def render_chat(
        self, messages: Sequence[Message], **options: Unpack[ChatOptions]
    ) -> RenderedChat:
        """Apply the model's chat template without generating."""
        request = model_pb2.RenderChatRequest(
            model=options.get("model", ""), chat=build_chat(messages, options)
        )
        response = await self._call(self._tokenizer.RenderChat, request)
        return RenderedChat(response.text, tuple(response.token_ids))

    def with_token(self, token: str | None) -> Self:
        """The same connection for another tenant; close only one of the two."""
        other = copy.copy(self)
        other._metadata = authorization(token)
        return other

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout: float | None = None,
    ) -> _Response:
        with translated_errors():
            return await method(request, timeout=self._deadline(timeout), metadata=self._metadata)

    def _attacher(
        self, deadline: float | None
    ) -> Callable[[inference_pb2.AttachStreamRequest], _AttachCall]:
        """Return a call of AttachStream that ends within `deadline` seconds from now."""
        end = None if deadline is None else time.monotonic() + deadline

        def attach(request: inference_pb2.AttachStreamRequest) -> _AttachCall:
            left = None if end is None else max(0.0, end - time.monotonic())
            return self._inference.AttachStream(request, timeout=left, metadata=self._metadata)

        return attach

    def _deadline(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else timeout
