"""InferenceService: generation, whole or streamed, and its cancellation.

Owns the order of one call: check, prompt to tokens, submit, answer, clean up. Does not know how
tokens come to be.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mili.router.api.engine import Engine
from mili.router.api.events import Answering, stream_events, whole_response
from mili.router.api.generation import Defaults, check_generation, to_params
from mili.router.api.model import ServedModel, revision
from mili.router.api.prompt import PromptReader, TextThreads
from mili.router.api.status import Context, NotFoundError, unsupported_method
from mili.router.api.stream import Stream
from mili.router.api.streams import Streams
from mili.router.api.supported import check_supported
from mili.router.errors import Reason, RequestError
from mili.v1 import inference_pb2 as pb
from mili.v1 import inference_pb2_grpc

_MAX_REQUEST_ID_BYTES = 128


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Generates with the one model."""

    def __init__(
        self,
        *,
        engine: Engine,
        streams: Streams,
        model: ServedModel,
        defaults: Defaults,
        prompts: PromptReader,
        threads: TextThreads,
        instance_id: str,
    ) -> None:
        self._engine = engine
        self._streams = streams
        self._model = model
        self._defaults = defaults
        self._prompts = prompts
        self._threads = threads
        self._instance_id = instance_id

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> pb.GenerateResponse:
        async with self._running(request, whole=True) as (stream, answering):
            return whole_response(answering, await stream.take())

    async def GenerateStream(  # noqa: N802
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """One write is in flight at a time, and what gathers meanwhile goes into the next."""
        async with self._running(request, whole=False) as (stream, answering):
            sequence = 1
            gathered = None
            while gathered is None or gathered.finished is None:
                gathered = await stream.take()
                for response in stream_events(answering, gathered, sequence):
                    yield response
                    sequence += 1

    def AttachStream(  # noqa: N802
        self, request: pb.AttachStreamRequest, context: Context
    ) -> AsyncIterator[pb.AttachStreamResponse]:
        raise unsupported_method("InferenceService.AttachStream")

    async def CancelGeneration(  # noqa: N802
        self, request: pb.CancelGenerationRequest, context: Context
    ) -> pb.CancelGenerationResponse:
        check_supported(request)
        try:
            cancelled = self._streams.cancel(request.request_id)
        except KeyError:
            raise NotFoundError(
                Reason.REQUEST_NOT_FOUND, "request", request.request_id, field="request_id"
            ) from None
        return pb.CancelGenerationResponse(cancelled=cancelled)

    @asynccontextmanager
    async def _running(
        self, request: pb.GenerateRequest | pb.GenerateStreamRequest, *, whole: bool
    ) -> AsyncIterator[tuple[Stream, Answering]]:
        """Admit a request, and see that nothing of it is left behind."""
        check_supported(request)
        generation = request.generation
        self._model.check_name(generation.model, "generation.model")
        check_generation(generation, self._engine.context_limit, self._defaults)
        stream = self._streams.open(_request_id(request.request_id), whole=whole)
        try:
            limit = self._engine.context_limit
            if self._prompts.is_quick(generation):
                prompt = self._prompts.read(generation, limit)
            else:
                prompt = await self._threads.run(self._prompts.read, generation, limit)
            # Asked for again: a worker with less room may have come in the meantime.
            params = to_params(generation, prompt, self._engine.context_limit, self._defaults)
            self._streams.submit(stream, params)
            yield (
                stream,
                Answering(
                    request_id=stream.request_id,
                    model=self._model.name,
                    model_revision=revision(self._engine.weights_sha256),
                    instance_id=self._instance_id,
                    seed=params.sampling.seed,
                    options=generation.output,
                ),
            )
        finally:
            self._streams.close(stream)


def _request_id(asked: str) -> str:
    if not asked:
        return uuid.uuid4().hex
    if len(asked.encode()) > _MAX_REQUEST_ID_BYTES or not asked.isprintable():
        raise RequestError(
            Reason.INVALID_FIELD,
            f"request_id is at most {_MAX_REQUEST_ID_BYTES} printable bytes",
            field="request_id",
        )
    return asked
