"""InferenceService: generation, whole or streamed, and its cancellation.

Owns the order of one call: check, prompt to tokens, submit, answer, clean up, and what of it the
tenant is charged. Does not know how tokens come to be, or how long what outlives its call is kept.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import TypeAlias

from google.protobuf.message import Message

from mili.router.api.engine import Engine
from mili.router.api.event_log import Render
from mili.router.api.events import Answering, stream_events, whole_response
from mili.router.api.generation import Defaults, check_generation, to_params
from mili.router.api.identity import caller
from mili.router.api.job import Job, digest_of, to_request_id
from mili.router.api.kept import Kept, KeptGenerations
from mili.router.api.logprobs import check_fits_whole
from mili.router.api.model import ServedModel, revision
from mili.router.api.prompt import PromptReader, TextThreads
from mili.router.api.scheduling import to_cache_namespace, to_scheduling
from mili.router.api.status import Context, NotFoundError
from mili.router.api.stream import Gathered, Stream
from mili.router.api.stream_options import StreamOptions, to_stream_options
from mili.router.api.streams import Streams
from mili.router.api.structured import StructuredOutputs
from mili.router.api.supported import check_supported
from mili.router.errors import Reason
from mili.router.quotas import Quotas
from mili.router.tokenizer import Tokenizer
from mili.v1 import inference_pb2 as pb
from mili.v1 import inference_pb2_grpc

_Request: TypeAlias = pb.GenerateRequest | pb.GenerateStreamRequest


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Generates with the one model. clock: the engine's."""

    def __init__(
        self,
        *,
        engine: Engine,
        streams: Streams,
        kept: KeptGenerations,
        model: ServedModel,
        tokenizer: Tokenizer,
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
        self._kept = kept
        self._model = model
        self._tokenizer = tokenizer
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
        job = self._job(request, StreamOptions(), context, whole=True)
        if job.is_kept:
            with self._kept.followed(self._found(request, job)) as log:
                (answer,) = await log.read(0)
                return pb.GenerateResponse.FromString(answer)
        async with self._running(job) as (stream, answering):
            return whole_response(answering, await stream.take_all())

    async def GenerateStream(  # noqa: N802
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """One write is in flight at a time, and what gathers meanwhile goes into the next."""
        options = to_stream_options(request.stream_options)
        job = self._job(request, options, context, whole=False)
        sequence = 0
        if job.is_kept:
            with self._kept.followed(self._found(request, job)) as log:
                while events := await log.read(sequence):
                    sequence += len(events)
                    for event in events:
                        yield pb.GenerateStreamResponse.FromString(event)
            return
        async with self._running(job) as (stream, answering):
            gathered = None
            while gathered is None or not gathered.is_last:
                gathered = await stream.take()
                for response in stream_events(answering, gathered, sequence + 1):
                    yield response
                    sequence += 1

    async def AttachStream(  # noqa: N802
        self, request: pb.AttachStreamRequest, context: Context
    ) -> AsyncIterator[pb.AttachStreamResponse]:
        check_supported(request)
        sequence = request.after_sequence
        kept = self._kept.attach(request.resume_token, caller().name, sequence)
        with self._kept.followed(kept) as log:
            while events := await log.read(sequence):
                sequence += len(events)
                for event in events:
                    # The same on the wire as the message that it was.
                    yield pb.AttachStreamResponse.FromString(event)

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

    def _job(
        self,
        request: _Request,
        options: StreamOptions,
        context: Context,
        *,
        whole: bool,
    ) -> Job:
        """Check a request, as far as that needs no prompt and nobody else's."""
        check_supported(request)
        generation, tenant = request.generation, caller()
        self._model.check_name(generation.model, "generation.model")
        check_generation(generation, self._engine.context_limit, self._defaults)
        return Job(
            request_id=to_request_id(request.request_id),
            is_kept=bool(request.request_id) or options.resume_window > 0,
            generation=generation,
            tenant=tenant,
            account=self._quotas.account(tenant),
            scheduling=to_scheduling(generation, tenant, self._deadline(context)),
            cache_namespace=to_cache_namespace(generation.cache, tenant),
            options=options,
            whole=whole,
        )

    def _found(self, request: _Request, job: Job) -> Kept:
        """The generation that the same request has begun, or one that begins now."""
        digest = digest_of(request)
        if kept := self._kept.find(job.tenant.scoped(job.request_id), digest):
            return kept
        stream = self._open(job)
        return self._kept.begin(
            stream,
            lambda token: self._start_kept(stream, job, token),
            tenant=job.tenant.name,
            digest=digest,
            window=job.options.resume_window,
        )

    async def _start_kept(self, stream: Stream, job: Job, resume_token: str) -> Render:
        answering = await self._start(stream, job, resume_token)
        if job.whole:
            return lambda gathered, _: (whole_response(answering, gathered),)

        def render(gathered: Sequence[Gathered], sequence: int) -> Iterator[Message]:
            (one,) = gathered
            return stream_events(answering, one, sequence)

        return render

    @asynccontextmanager
    async def _running(self, job: Job) -> AsyncIterator[tuple[Stream, Answering]]:
        """Start a request, and see that nothing of it is left behind."""
        stream = self._open(job)
        try:
            yield stream, await self._start(stream, job)
        finally:
            self._streams.close(stream)

    def _open(self, job: Job) -> Stream:
        """Make a request live; its output is charged at its end."""
        job.account.admit()
        stream = self._streams.open(
            job.tenant.scoped(job.request_id), whole=job.whole, flush=job.options.flush
        )

        def charge() -> None:
            if stream.finished is not None:
                job.account.charge(stream.finished.usage.completion_tokens)

        stream.on_end.append(charge)
        return stream

    async def _start(self, stream: Stream, job: Job, resume_token: str = "") -> Answering:
        """Read the prompt, and submit the request."""
        prompt = await self._read(job.generation)
        constraint = await self._structured.read(job.generation.structured_output, prompt)
        if job.whole:
            check_fits_whole(job.generation.output, len(prompt))
        # Asked for again: a worker with less room may have come in the meantime.
        params = to_params(
            job.generation,
            prompt,
            self._engine.context_limit,
            self._defaults,
            cache_namespace=job.cache_namespace,
            scheduling=job.scheduling,
            constraint=constraint,
        )
        job.account.check(len(prompt))
        self._streams.submit(stream, params)
        job.account.charge(len(prompt))
        return Answering(
            request_id=job.request_id,
            model=self._model.name,
            model_revision=revision(self._engine.weights_sha256),
            instance_id=self._instance_id,
            seed=params.sampling.seed,
            options=job.generation.output,
            token_bytes=self._tokenizer.token_bytes,
            resume_token=resume_token,
            recovery_notices=job.options.recovery_notices,
        )

    async def _read(self, generation: pb.Generation) -> list[int]:
        """Return the prompt's token ids."""
        limit = self._engine.context_limit
        if self._prompts.is_quick(generation):
            return self._prompts.read(generation, limit)
        return await self._threads.run(self._prompts.read, generation, limit)

    def _deadline(self, context: Context) -> float:
        """Return when the call's own deadline passes, by the engine's clock."""
        remaining = context.time_remaining()
        return math.inf if remaining is None else self._clock() + remaining
