"""Streams of a served model, read as a caller reads them, and the server's books beside them.

Owns what a stream must look like whatever happens to the server. Does not know what happens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import grpc

from mili.client import AsyncClient, Generation
from mili.v1 import admin_pb2
from mili.v1.admin_pb2_grpc import AdminServiceStub

# Nothing here takes so long: a call that does hangs. Seconds.
PATIENCE = 60.0


class Job(NamedTuple):
    """What to generate. Without a seed greedily, else at temperature 1."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0 if self.seed is None else 1,
            "seed": self.seed,
            "ignore_eos": True,
        }


class Told(NamedTuple):
    """What a caller gets to see of the model."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str


def make_jobs(count: int, max_tokens: int) -> list[Job]:
    """Jobs of which every other begins with the same three blocks, and every third is greedy."""
    shared = tuple(range(7, 55))
    return [
        Job(
            prompt=shared * (number % 2) + (200 + number % 50, number // 50, 3, 1, 4),
            max_tokens=max_tokens,
            seed=None if number % 3 == 0 else number,
        )
        for number in range(count)
    ]


def told(generation: Generation) -> Told:
    return Told(generation.token_ids, generation.text, generation.finish_reason)


async def alone(client: AsyncClient, jobs: Iterable[Job]) -> list[Told]:
    """What each job gives when nothing else runs."""
    return [told(await client.generate(**job.options())) for job in jobs]


class Reading:
    """A stream that is being read. Its events are numbered without a gap, and so are its tokens."""

    def __init__(
        self, client: AsyncClient, job: Job, *, timeout: float = PATIENCE, request_id: str = ""
    ) -> None:
        self.num_tokens = 0
        self._stream = client.stream(**job.options(), timeout=timeout, request_id=request_id)
        self._moved = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    async def has(self, count: int) -> None:
        """Wait for so many tokens."""
        while self.num_tokens < count:
            assert not self.ended, f"ended after {self.num_tokens} tokens, of {count}"
            self._moved.clear()
            await self._moved.wait()

    async def end(self) -> Generation:
        """Wait for the last event. Raises MiliError where the stream failed."""
        return await self._task

    def close(self) -> None:
        """Cancel the call, as a caller does that has read enough."""
        self._stream.close()

    @property
    def ended(self) -> bool:
        """Whether the last event came. Raises what the stream failed with."""
        if self._task.done():
            self._task.result()
        return self._task.done()

    async def _read(self) -> Generation:
        num_events = 0
        try:
            async for event in self._stream.events():
                num_events += 1
                assert event.sequence == num_events, "an event is missing or doubled"
                if event.HasField("delta"):
                    assert event.delta.first_token_index == self.num_tokens, "tokens are"
                    self.num_tokens += event.delta.num_tokens
                    self._moved.set()
        finally:
            self._moved.set()
        generation = self._stream.generation
        assert self.num_tokens == len(generation.token_ids) == generation.usage.completion_tokens
        return generation


async def read_all(client: AsyncClient, jobs: Iterable[Job], count: int) -> list[Reading]:
    """Start a stream for each job; return when each has `count` tokens."""
    readings = [Reading(client, job) for job in jobs]
    for reading in readings:
        await reading.has(count)
    return readings


def assert_some_run(readings: Iterable[Reading]) -> None:
    """What a test disturbs must not have ended before: else it would prove nothing."""
    assert not all(reading.ended for reading in readings), "too late: every stream has ended"


async def ends(readings: Iterable[Reading]) -> list[Generation]:
    return list(await asyncio.gather(*(reading.end() for reading in readings)))


async def list_workers(admin: str) -> Sequence[admin_pb2.Worker]:
    """Ask the AdminService at host:port, when it can be reached."""
    options = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 100))
    async with grpc.aio.insecure_channel(admin, options) as channel:
        request = admin_pb2.ListWorkersRequest()
        list_workers = AdminServiceStub(channel).ListWorkers
        response = await list_workers(request, wait_for_ready=True, timeout=PATIENCE)
        return response.workers


async def states(admin: str) -> dict[str, str]:
    """The state of each worker by its name, as in {"worker-0": "SERVING"}."""
    names = admin_pb2.WorkerState.Name
    return {
        worker.name: names(worker.state).removeprefix("WORKER_STATE_")
        for worker in await list_workers(admin)
    }


async def until_states(admin: str, **expected: str) -> None:
    """Wait until the workers, written with _ for -, are in these states and there is no other."""
    wanted = {name.replace("_", "-"): state for name, state in expected.items()}
    end = time.monotonic() + PATIENCE
    while (found := await states(admin)) != wanted:
        assert time.monotonic() < end, f"workers are {found}, not {wanted}"
        await asyncio.sleep(0.02)


async def until_quiet(admin: str) -> None:
    """Wait until no sequence runs; then every block must be free or cached, save the null block."""
    end = time.monotonic() + 10
    workers = await list_workers(admin)
    while any(worker.running_sequences for worker in workers):
        assert time.monotonic() < end, f"sequences run on and on: {workers}"
        await asyncio.sleep(0.02)
        workers = await list_workers(admin)
    for worker in workers:
        assert worker.kv_blocks_total > 1
        assert worker.kv_blocks_free + worker.kv_blocks_cached + 1 == worker.kv_blocks_total, worker
