"""InferenceService: generation, whole or streamed, and its cancellation.

Owns the order of one call: check, prompt to tokens, submit, answer, clean up, and what of it the
tenant is charged. Does not know how tokens come to be.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from mili.router.api.engine import Engine
from mili.router.api.events import Answering, stream_events, whole_response
from mili.router.api.generation import Defaults, check_generation, to_params
from mili.router.api.identity import caller
from mili.router.api.model import ServedModel, revision
from mili.router.api.prompt import PromptReader, TextThreads
from mili.router.api.scheduling import to_cache_namespace, to_scheduling
from mili.router.api.status import Context, NotFoundError, unsupported_method
from mili.router.api.stream import Stream
from mili.router.api.streams import Streams
from mili.router.api.structured import StructuredOutputs
from mili.router.api.supported import check_supported
from mili.router.errors import Reason, RequestError
from mili.router.quotas import Quotas
from mili.v1 import inference_pb2 as pb
from mili.v1 import inference_pb2_grpc

_MAX_REQUEST_ID_BYTES = 128


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Generates with the one model. clock: the engine's."""

    def __init__(
        self,
        *,
        engine: Engine,
        streams: Streams,
        model: ServedModel,
        defaults: Defaults,
        prompts: PromptReader,
        threads: TextThreads,
        structured: StructuredOutputs,
        quotas: Quotas,
        instance_id: str,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._streams = streams
        self._model = model
        self._defaults = defaults
        self._prompts = prompts
        self._threads = threads
        self._structured = structured
        self._quotas = quotas
        self._instance_id = instance_id
        self._clock = clock

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> pb.GenerateResponse:
        async with self._running(request, context, whole=True) as (stream, answering):
            return whole_response(answering, await stream.take_all())

    async def GenerateStream(  # noqa: N802
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """One write is in flight at a time, and what gathers meanwhile goes into the next."""
        async with self._running(request, context, whole=False) as (stream, answering):
            sequence = 1
            gathered = None
            while gathered is None or not gathered.is_last:
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
            cancelled = self._streams.cancel(caller().scoped(request.request_id))
        except KeyError:
            raise NotFoundError(
                Reason.REQUEST_NOT_FOUND, "request", request.request_id, field="request_id"
            ) from None
        return pb.CancelGenerationResponse(cancelled=cancelled)

    @asynccontextmanager
    async def _running(
        self,
        request: pb.GenerateRequest | pb.GenerateStreamRequest,
        context: Context,
        *,
        whole: bool,
    ) -> AsyncIterator[tuple[Stream, Answering]]:
        """Admit a request, and see that nothing of it is left behind."""
        check_supported(request)
        generation, tenant = request.generation, caller()
        self._model.check_name(generation.model, "generation.model")
        check_generation(generation, self._engine.context_limit, self._defaults)
        scheduling = to_scheduling(generation, tenant, self._deadline(context))
        namespace = to_cache_namespace(generation.cache, tenant)
        request_id = _request_id(request.request_id)
        account = self._quotas.account(tenant)
        account.admit()
        stream = self._streams.open(tenant.scoped(request_id), whole=whole)
        try:
            prompt = await self._read(generation)
            constraint = await self._structured.read(generation.structured_output, prompt)
            # Asked for again: a worker with less room may have come in the meantime.
            params = to_params(
                generation,
                prompt,
                self._engine.context_limit,
                self._defaults,
                cache_namespace=namespace,
                scheduling=scheduling,
                constraint=constraint,
            )
            account.check(len(prompt))
            self._streams.submit(stream, params)
            account.charge(len(prompt))
            yield stream, self._answering(request_id, generation.output, params.sampling.seed)
        finally:
            self._streams.close(stream)
            if stream.finished is not None:
                account.charge(stream.finished.usage.completion_tokens)

    async def _read(self, generation: pb.Generation) -> list[int]:
        """Return the prompt's token ids."""
        limit = self._engine.context_limit
        if self._prompts.is_quick(generation):
            return self._prompts.read(generation, limit)
        return await self._threads.run(self._prompts.read, generation, limit)

    def _answering(self, request_id: str, options: pb.OutputOptions, seed: int) -> Answering:
        return Answering(
            request_id=request_id,
            model=self._model.name,
            model_revision=revision(self._engine.weights_sha256),
            instance_id=self._instance_id,
            seed=seed,
            options=options,
        )

    def _deadline(self, context: Context) -> float:
        """Return when the call's own deadline passes, by the engine's clock."""
        remaining = context.time_remaining()
        return math.inf if remaining is None else self._clock() + remaining


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
