"""Requests that only read the model: sent a few at a time, and awaited together.

Owns their life. Does not know what is read, or for whom.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

from mili.router.api.events import check_success
from mili.router.api.stream import Gathered
from mili.router.api.streams import Streams
from mili.router.outcome import Usage
from mili.router.params import GenerationParams

# Requests of one call in the engine: enough to fill a step, and few beside a queue.
_AT_ONCE = 64


class Passes:
    """Forward passes that sample nothing."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    async def run(self, asked: Sequence[GenerationParams]) -> list[Gathered]:
        """Return what each request gathered; raise RequestError where one failed, ending all."""
        gate = asyncio.Semaphore(_AT_ONCE)
        tasks = [asyncio.create_task(self._run_one(gate, params)) for params in asked]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_one(self, gate: asyncio.Semaphore, params: GenerationParams) -> Gathered:
        async with gate:
            stream = self._streams.open(f"read/{uuid.uuid4().hex}", whole=True)
            try:
                self._streams.submit(stream, params)
                gathered = await stream.take()
            finally:
                self._streams.close(stream)
        assert gathered.finished is not None
        check_success(gathered.finished)
        return gathered


def usage_of(gathered: Gathered) -> Usage:
    """Return what one pass used."""
    assert gathered.finished is not None
    return gathered.finished.usage
