"""Processes that die or stand still under streams: every stream goes on as if nothing had been."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jsonschema
import psutil
import pytest
from grpc.aio import insecure_channel

from mili.client import AsyncClient, Unavailable
from mili.client.requests import build_generation
from mili.client.results import Generation
from mili.v1 import inference_pb2 as pb
from mili.v1.inference_pb2_grpc import InferenceServiceStub
from tests.model_folders import make_model_folder
from tests.serving import STEADY, Served, serving
from tests.streams import (
    Told,
    ends,
    list_workers,
    make_jobs,
    read_all,
    states,
    told,
    until_quiet,
    until_states,
)

# Long, so that a worker that is slow to begin does not find the other's streams ended.
JOBS = make_jobs(16, max_tokens=900)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("failover") / "tiny")


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with serving(model, model.parent / "log", **STEADY) as served:
        yield served


@pytest.fixture(scope="module")
def undisturbed(served: Served) -> list[Told]:
    """What the jobs give when nothing happens."""

    async def run() -> list[Told]:
        async with AsyncClient(served.address) as client:
            return list(map(told, await ends(await read_all(client, JOBS, 0))))

    return asyncio.run(run())


async def busiest(admin: str) -> str:
    """The name of the worker on which most sequences run."""
    return max(await list_workers(admin), key=lambda worker: worker.running_sequences).name


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()


async def test_a_killed_worker_is_restarted_and_every_stream_goes_on(
    served: Served, undisturbed: list[Told]
) -> None:
    async with AsyncClient(served.address) as client:
        readings = await read_all(client, JOBS, 20)
        (worker,) = served.children("worker")
        worker.kill()
        generations = await ends(readings)

    assert list(map(told, generations)) == undisturbed
    moved = [generation for generation in generations if generation.timing.recoveries]
    assert len(moved) > 8, "too late: few were disturbed"
    assert all(generation.usage.recomputed_tokens > 0 for generation in moved)
    assert [child.pid for child in served.children("worker")] != [worker.pid]
    await until_quiet(served.admin)


async def test_a_caller_that_comes_back_after_its_worker_died_misses_nothing(
    served: Served, undisturbed: list[Told]
) -> None:
    job = JOBS[0]._asdict() | {"temperature": 0, "ignore_eos": True}
    request = pb.GenerateStreamRequest(generation=build_generation(job.pop("prompt"), job))
    request.stream_options.resume_window.seconds = 60
    request.stream_options.include_recovery_notices = True
    events: list[pb.StreamEvent] = []
    async with insecure_channel(served.address) as channel:
        async for response in InferenceServiceStub(channel).GenerateStream(request):
            events.append(response.event)
            if response.event.delta.first_token_index >= 20:
                break
    (worker,) = served.children("worker")
    worker.kill()
    attach = pb.AttachStreamRequest(
        resume_token=events[0].started.resume_token, after_sequence=len(events)
    )
    async with insecure_channel(served.address) as channel:
        async for attached in InferenceServiceStub(channel).AttachStream(attach):
            events.append(attached.event)

    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    token_ids = [token for event in events for token in event.delta.token_ids]
    assert tuple(token_ids) == undisturbed[0].token_ids
    (notice,) = [event.recovery for event in events if event.HasField("recovery")]
    assert (notice.reason, notice.recomputed_tokens > 0) == ("WORKER_LOST", True)
    await until_quiet(served.admin)


async def test_outputs_of_a_killed_worker_go_on_within_their_schemas(served: Served) -> None:
    """Behind what was generated, in the middle of a string, as if nothing had been."""
    person = {
        "type": "object",
        "properties": {"name": {"type": "string", "pattern": "^[a-z ]{80,90}$"}},
        "required": ["name"],
        "additionalProperties": False,
    }
    schema = {"type": "array", "minItems": 4, "maxItems": 4, "items": person}

    async def run(client: AsyncClient, disturb: Callable[[], None]) -> list[Generation]:
        streams = [
            client.stream("people", response_format=schema, temperature=1.0, seed=seed)
            for seed in range(8)
        ]
        begun = [aiter(stream) for stream in streams]
        for pieces in begun:
            for _ in range(20):
                await anext(pieces)
        disturb()
        for pieces in begun:
            async for _ in pieces:
                pass
        return [stream.generation for stream in streams]

    async with AsyncClient(served.address) as client:
        alone = await run(client, lambda: None)
        (worker,) = served.children("worker")
        killed = await run(client, worker.kill)
    assert [each.text for each in killed] == [each.text for each in alone]
    assert sum(each.timing.recoveries for each in killed) > 4, "too late: few were disturbed"
    for each in killed:
        jsonschema.validate(json.loads(each.text), schema)
    await until_quiet(served.admin)


async def test_a_killed_router_is_restarted_where_it_was(
    served: Served, undisturbed: list[Told]
) -> None:
    (worker,) = served.children("worker")
    (router,) = served.children("router")
    async with AsyncClient(served.address) as client:
        readings = await read_all(client, JOBS, 20)
        router.kill()
        results = await asyncio.gather(
            *(reading.end() for reading in readings), return_exceptions=True
        )
        assert [type(result) for result in results] == [Unavailable] * len(JOBS)

        await until_states(served.admin, worker_0="SERVING")
        assert served.children("worker") == [worker], "the worker was restarted as well"
        assert list(map(told, await ends(await read_all(client, JOBS, 0)))) == undisturbed
    await until_quiet(served.admin)


async def test_streams_of_a_worker_that_stands_still_move_to_another(
    model: Path, undisturbed: list[Told], tmp_path: Path
) -> None:
    with serving(model, tmp_path / "log", "--workers", "2", **STEADY) as served:
        await until_states(served.admin, worker_0="SERVING", worker_1="SERVING")
        async with AsyncClient(served.address) as client:
            readings = await read_all(client, JOBS, 20)
            name = await busiest(served.admin)
            (worker,) = (
                child for child in served.children("worker") if child.environ()["MILI_NAME"] == name
            )
            with stopped(worker):
                generations = await ends(readings)
                assert (await states(served.admin))[name] == "LOST"
            assert list(map(told, generations)) == undisturbed
            moved = [generation for generation in generations if generation.timing.recoveries]
            assert moved, "too late: nobody was disturbed"
            assert name not in {generation.timing.worker for generation in generations}

            await until_states(served.admin, worker_0="SERVING", worker_1="SERVING")
            others = await ends(await read_all(client, make_jobs(32, max_tokens=100)[16:], 0))
            assert name in {generation.timing.worker for generation in others}
        await until_quiet(served.admin)
