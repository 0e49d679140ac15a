"""The routes of OpenAI's API, as an ASGI application.

Owns who asks for what: paths, bodies, the caller's token. What an answer looks like is said in
chat.py and completions.py.
"""

from __future__ import annotations

import asyncio
import base64
import sys
from array import array
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mili.client.aio import AsyncClient
from mili.client.channel import MAX_MESSAGE_BYTES
from mili.client.errors import MiliError
from mili.client.http import errors
from mili.client.http.answers import Json
from mili.client.http.bodies import Body, ChatBody, CompletionBody, EmbeddingsBody
from mili.client.http.chat import ChatChunks, chat_answer, chat_options
from mili.client.http.completions import CompletionChunks, completion_answer
from mili.client.http.errors import BodyError
from mili.client.http.streaming import EventStream, while_connected
from mili.client.results import Generation
from mili.v1 import model_pb2

_Body = TypeVar("_Body", bound=Body)


def make_app(client: AsyncClient) -> Starlette:
    """Return the application. client: a connection without a token; callers bring their own."""
    front = _Front(client)
    return Starlette(
        routes=[
            Route("/v1/models", front.models),
            Route("/v1/models/{name:path}", front.model),
            Route("/v1/chat/completions", front.chat, methods=["POST"]),
            Route("/v1/completions", front.completions, methods=["POST"]),
            Route("/v1/embeddings", front.embeddings, methods=["POST"]),
        ],
        exception_handlers={
            MiliError: errors.on_mili_error,
            BodyError: errors.on_body_error,
            HTTPException: errors.on_http_exception,
            Exception: errors.on_failure,
        },
    )


class _Front:
    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def models(self, request: Request) -> Response:
        models = await self._caller(request).models()
        return JSONResponse({"object": "list", "data": [_model(model) for model in models]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        return JSONResponse(_model(await self._caller(request).model(name)))

    async def chat(self, request: Request) -> Response:
        body = await _read(request, ChatBody)
        client = self._caller(request)
        try:
            options = chat_options(body)
            if body.stream:
                stream = client.stream(**options)
                answer = EventStream([stream], ChatChunks(body), include_usage=body.include_usage)
                await answer.begin(request)
                return answer
            result = await while_connected(request, client.generate(**options))
        except (TypeError, ValueError) as error:
            raise BodyError(str(error)) from None
        return _answer([result], chat_answer(_whole(result), body))

    async def completions(self, request: Request) -> Response:
        body = await _read(request, CompletionBody)
        client = self._caller(request)
        options = body.options()
        try:
            if body.stream:
                streams = [client.stream(prompt, **options) for prompt in body.prompts]
                answer = EventStream(
                    streams, CompletionChunks(body), include_usage=body.include_usage
                )
                await answer.begin(request)
                return answer
            calls = (client.generate(prompt, **options) for prompt in body.prompts)
            results = await while_connected(request, _all(calls))
        except (TypeError, ValueError) as error:
            raise BodyError(str(error)) from None
        return _answer(results, completion_answer([_whole(result) for result in results], body))

    async def embeddings(self, request: Request) -> Response:
        body = await _read(request, EmbeddingsBody)
        call = self._caller(request).embed(
            body.inputs, model=body.model, dimensions=body.dimensions
        )
        try:
            result = await while_connected(request, call)
        except (TypeError, ValueError) as error:
            raise BodyError(str(error), param="input") from None
        encode = _base64 if body.encoding_format == "base64" else list
        data = [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, vector in enumerate(result.vectors)
        ]
        count = result.usage.prompt_tokens
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})

    def _caller(self, request: Request) -> AsyncClient:
        """The client with the caller's own token."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            return self._client
        try:
            return self._client.with_token(token)
        except ValueError as error:
            raise BodyError(str(error), status=401) from None


async def _read(request: Request, kind: type[_Body]) -> _Body:
    """Read a JSON body of at most what gRPC would take."""
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > MAX_MESSAGE_BYTES:
            limit = f"the body is larger than {MAX_MESSAGE_BYTES} bytes"
            raise BodyError(limit, status=413)
    try:
        return kind.model_validate_json(bytes(content))
    except ValidationError as error:
        raise errors.from_validation(error) from None


async def _all(calls: Iterable[Coroutine[Any, Any, Generation]]) -> list[Generation]:
    """Wait for all; the first failure cancels the others and is raised."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _whole(result: Generation) -> Generation:
    """A choice has no error of its own in this API: raise it."""
    for sequence in result.sequences:
        if sequence.error is not None:
            raise sequence.error
    return result


def _answer(results: Sequence[Generation], content: Json) -> Response:
    return JSONResponse(content, headers={"x-request-id": results[0].request_id})


def _model(model: model_pb2.Model) -> Json:
    """created is what OpenAI's clients want to find: nobody knows when it was."""
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "mili"}


def _base64(vector: Sequence[float]) -> str:
    """Little-endian float32."""
    values = array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values).decode()
