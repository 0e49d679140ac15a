"""Many streams at once against real processes: nobody's end changes another's tokens."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from mili.client import AsyncClient, Cancelled, DeadlineExceeded
from mili.router.siblings import sequence_seed
from mili.v1 import inference_pb2 as pb
from mili.v1.inference_pb2_grpc import InferenceServiceStub
from tests.model_folders import make_model_folder
from tests.serving import STEADY, Served, serving
from tests.streams import (
    Reading,
    alone,
    assert_some_run,
    ends,
    list_workers,
    make_jobs,
    read_all,
    told,
    until_quiet,
)

# Longer than any test: such a stream ends only when somebody ends it.
ENDLESS = 3500

# Reads streams until it is killed; says so when each has begun.
CLIENT = """
import asyncio, sys
from mili.client import AsyncClient

async def read(client, number):
    stream = client.stream([*range(7, 55), number], max_tokens=int(sys.argv[2]), ignore_eos=True)
    pieces = aiter(stream)
    await anext(pieces)
    began.release()
    async for _ in pieces:
        pass

async def main():
    async with AsyncClient(sys.argv[1]) as client:
        async with asyncio.TaskGroup() as tasks:
            for number in range(8):
                tasks.create_task(read(client, number))
            for _ in range(8):
                await began.acquire()
            print("reading", flush=True)

began = asyncio.Semaphore(0)
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("end_to_end")
    model = make_model_folder(folder / "tiny", max_position_embeddings=4096)
    with serving(model, folder / "log", **STEADY) as served:
        yield served


@contextmanager
def client_process(address: str) -> Iterator[subprocess.Popen[str]]:
    """A process that reads 8 endless streams, each of which has begun."""
    command = [sys.executable, "-P", "-c", CLIENT, address, str(ENDLESS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "reading\n"
            yield process
        finally:
            process.kill()


async def test_64_streams_of_which_half_end_too_early(served: Served) -> None:
    jobs = make_jobs(32, max_tokens=100)
    endless = [job._replace(max_tokens=ENDLESS) for job in jobs[:8]]
    async with AsyncClient(served.address, timeout=60) as client:
        expected = await alone(client, jobs)
        with client_process(served.address) as doomed:
            late = [Reading(client, job, timeout=1.0) for job in endless]
            left = await read_all(client, endless, 1)
            names = [f"cancelled-{number}" for number in range(8)]
            cancelled = [
                Reading(client, job, request_id=name)
                for job, name in zip(endless, names, strict=True)
            ]
            readings = await read_all(client, jobs, 5)
            for reading in cancelled:
                await reading.has(5)
            assert (await list_workers(served.admin))[0].running_sequences >= 56
            doomed.kill()
            for reading in left:
                reading.close()
            assert all(await asyncio.gather(*map(client.cancel, names)))
            assert_some_run(readings)

        assert [told(generation) for generation in await ends(readings)] == expected
        for generation in await ends(cancelled):
            assert generation.finish_reason == "cancelled"
            assert 5 <= len(generation.token_ids) < ENDLESS
        for reading in left:
            with pytest.raises(Cancelled):
                await reading.end()
        for reading in late:
            with pytest.raises(DeadlineExceeded):
                await reading.end()
    await until_quiet(served.admin)


async def test_each_sequence_is_what_its_seed_gives_alone(served: Served) -> None:
    def asking(seed: int, count: int) -> pb.GenerateRequest:
        generation = pb.Generation(
            token_ids=pb.TokenIds(ids=range(7, 77)),
            sampling=pb.SamplingParams(temperature=1, seed=seed, num_sequences=count),
            stopping=pb.StopConditions(max_tokens=24, ignore_eos=True),
            output=pb.OutputOptions(token_ids=True),
        )
        return pb.GenerateRequest(generation=generation)

    seeds = [sequence_seed(5, index) for index in range(6)]
    async with grpc.aio.insecure_channel(served.address) as channel:
        generate = InferenceServiceStub(channel).Generate
        together = await generate(asking(5, 6))
        single = [await generate(asking(seed, 1)) for seed in seeds]
    assert [each.index for each in together.sequences] == list(range(6))
    outputs = [list(each.token_ids) for each in together.sequences]
    assert outputs == [list(each.sequences[0].token_ids) for each in single]
    assert len({tuple(output) for output in outputs}) == 6
    assert (together.usage.prompt_tokens, together.usage.completion_tokens) == (70, 144)
    await until_quiet(served.admin)
