"""Prefixes that an operator keeps in the cache: computed as any prompt is, then pinned.

Owns the order of that. Does not know how a pin holds, or when it ends: the engine does.
"""

from __future__ import annotations

import uuid

from mili.internal.v1.step_pb2 import Sampling
from mili.router.api.durations import to_positive_seconds
from mili.router.api.engine import Engine
from mili.router.api.events import check_success
from mili.router.api.generation import Defaults, check_length
from mili.router.api.prompt import PromptReader, TextThreads
from mili.router.api.sampling import check_token_ids
from mili.router.api.streams import Streams
from mili.router.errors import Reason, RequestError
from mili.router.introspection import Pinned
from mili.router.params import GenerationParams, Scheduling
from mili.router.tenants import Tenant
from mili.v1.admin_pb2 import PinPrefixRequest

_LONGEST_TIME_TO_LIVE = 30 * 24 * 3600
_GREEDY = Sampling(temperature=0, top_p=1, repetition_penalty=1)


class Pins:
    """Computes and pins prefixes."""

    def __init__(
        self,
        engine: Engine,
        streams: Streams,
        defaults: Defaults,
        prompts: PromptReader,
        threads: TextThreads,
    ) -> None:
        self._engine = engine
        self._streams = streams
        self._defaults = defaults
        self._prompts = prompts
        self._threads = threads

    async def pin(self, request: PinPrefixRequest, tenant: Tenant) -> Pinned:
        """Compute what is not cached of the prefix, and keep it until its time is over.

        Raises RequestError for a bad request, and where the prefix cannot be computed now.
        """
        seconds = to_positive_seconds(request.time_to_live, "time_to_live")
        if seconds > _LONGEST_TIME_TO_LIVE:
            raise RequestError(
                Reason.INVALID_FIELD,
                f"time_to_live is at most {_LONGEST_TIME_TO_LIVE} seconds",
                field="time_to_live",
            )
        token_ids = await self._read(request)
        namespace = tenant.cache_namespace("")
        await self._compute(
            GenerationParams(
                prompt_token_ids=token_ids,
                sampling=_GREEDY,
                max_tokens=1,
                text=False,
                cache_namespace=namespace,
                scheduling=Scheduling(tenant=tenant.name, weight=tenant.weight),
            )
        )
        return self._engine.operations.pin(namespace, token_ids, seconds)

    async def _read(self, request: PinPrefixRequest) -> list[int]:
        kind = request.WhichOneof("prefix")
        if kind is None:
            raise RequestError(Reason.INVALID_FIELD, "prefix is missing", field="prefix")
        limit = self._engine.context_limit
        token_ids = await self._threads.run(self._prompts.read_prefix, request, limit)
        check_length(len(token_ids), kind, self._engine.context_limit)
        check_token_ids(token_ids, self._defaults.vocab_size, kind)
        if len(token_ids) < self._engine.block_size:
            raise RequestError(
                Reason.INVALID_FIELD,
                f"the prefix has {len(token_ids)} tokens: it is shared in whole blocks of"
                f" {self._engine.block_size}",
                field=kind,
            )
        return token_ids

    async def _compute(self, params: GenerationParams) -> None:
        """Generate one token, so that the prompt's blocks are in the cache."""
        stream = self._streams.open(f"pin/{uuid.uuid4().hex}", whole=True)
        try:
            self._streams.submit(stream, params)
            gathered = await stream.take()
        finally:
            self._streams.close(stream)
        assert gathered.finished is not None
        check_success(gathered.finished)
