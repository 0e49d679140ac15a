"""The client for asyncio: the same calls as sync.py, awaited.

Owns the channel. What goes over it is made in requests.py and read in results.py.
"""
# ruff: noqa: ASYNC109  (a timeout is gRPC's deadline here, which the server is told)

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Self, TypeVar, Unpack

import grpc

from mili.client.channel import OPTIONS, authorization
from mili.client.errors import Cancelled, translated_errors
from mili.client.requests import Message, Options, Prompt, build_chat, build_generation
from mili.client.results import Generation, PartialGeneration, RenderedChat, from_response
from mili.v1 import inference_pb2, model_pb2
from mili.v1.inference_pb2_grpc import InferenceServiceStub
from mili.v1.model_pb2_grpc import ModelServiceStub, TokenizerServiceStub

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_StreamCall = grpc.aio.UnaryStreamCall[
    inference_pb2.GenerateStreamRequest, inference_pb2.GenerateStreamResponse
]


class AsyncTextStream(PartialGeneration):
    """Text as it is generated: iterate over it with `async for`.

    Leaving the loop early, `close`, cancelling the task, and the end of an `async with` block
    cancel the generation. After the last piece, `finish_reason`, `usage` and the whole
    `generation` are there.
    """

    def __init__(self, call: _StreamCall) -> None:
        super().__init__()
        self._call = call
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[str]:
        async for event in self.events():
            if event.delta.text:
                yield event.delta.text

    async def events(self) -> AsyncIterator[inference_pb2.StreamEvent]:
        """The events themselves, for callers that want token ids or times beside the text."""
        try:
            with translated_errors():
                async for response in self._call:
                    self.push(response.event)
                    yield response.event
            self.check_finished()
        except asyncio.CancelledError:
            # gRPC raises this also where another task closed the stream, and this one lives on.
            if self._closed:
                raise Cancelled(grpc.StatusCode.CANCELLED, "the stream was closed") from None
            raise
        finally:
            self.close()

    def close(self) -> None:
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """A connection to one MILI server, made inside a running event loop.

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
            self._channel = grpc.aio.insecure_channel(address, OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, OPTIONS)
        self._inference = InferenceServiceStub(self._channel)
        self._models = ModelServiceStub(self._channel)
        self._tokenizer = TokenizerServiceStub(self._channel)

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
        return from_response(await self._call(self._inference.Generate, request, timeout))

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        request_id: str = "",
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncTextStream:
        """Like `generate`, but text comes as it is made. Errors come with the first piece."""
        request = inference_pb2.GenerateStreamRequest(
            request_id=request_id, generation=build_generation(prompt, options)
        )
        return AsyncTextStream(
            self._inference.GenerateStream(
                request, timeout=self._deadline(timeout), metadata=self._metadata
            )
        )

    async def cancel(self, request_id: str) -> bool:
        """End another call's generation; False if it had already ended."""
        request = inference_pb2.CancelGenerationRequest(request_id=request_id)
        return (await self._call(self._inference.CancelGeneration, request)).cancelled

    async def models(self) -> list[model_pb2.Model]:
        """What is served, and with which limits."""
        request = model_pb2.ListModelsRequest()
        return list((await self._call(self._models.ListModels, request)).models)

    async def tokenize(self, texts: Sequence[str], *, model: str = "") -> list[list[int]]:
        request = model_pb2.TokenizeRequest(model=model, texts=texts)
        response = await self._call(self._tokenizer.Tokenize, request)
        return [list(result.ids) for result in response.results]

    async def detokenize(self, token_ids: Sequence[Sequence[int]], *, model: str = "") -> list[str]:
        request = model_pb2.DetokenizeRequest(
            model=model, token_ids=[inference_pb2.TokenIds(ids=ids) for ids in token_ids]
        )
        return list((await self._call(self._tokenizer.Detokenize, request)).texts)

    async def render_chat(self, messages: Sequence[Message], *, model: str = "") -> RenderedChat:
        """Apply the model's chat template without generating."""
        request = model_pb2.RenderChatRequest(model=model, chat=build_chat(messages, None))
        response = await self._call(self._tokenizer.RenderChat, request)
        return RenderedChat(response.text, tuple(response.token_ids))

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout: float | None = None,
    ) -> _Response:
        with translated_errors():
            return await method(request, timeout=self._deadline(timeout), metadata=self._metadata)

    def _deadline(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else timeout
