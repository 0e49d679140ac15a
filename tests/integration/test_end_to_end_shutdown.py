"""How `mili serve` ends under streams: with what it promised, and with no process left."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import psutil
import pytest

from mili.client import AsyncClient, Unavailable
from mili.client.errors import from_rpc_error
from mili.v1 import inference_pb2
from mili.v1.inference_pb2_grpc import InferenceServiceStub
from tests.model_folders import make_model_folder
from tests.serving import STEADY, Served, serving
from tests.streams import PATIENCE, assert_some_run, ends, make_jobs, read_all, told

JOBS = make_jobs(16, max_tokens=300)
ENDLESS = make_jobs(16, max_tokens=16000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shutdown")
    return make_model_folder(folder / "tiny", max_position_embeddings=16384)


async def refusal(address: str) -> Unavailable:
    """Ask, without the client's retries, until the server takes no more requests."""
    generation = inference_pb2.Generation(text="x")
    generation.stopping.max_tokens = 1
    request = inference_pb2.GenerateRequest(generation=generation)
    async with grpc.aio.insecure_channel(address, (("grpc.enable_retries", 0),)) as channel:
        while True:
            try:
                await InferenceServiceStub(channel).Generate(request, timeout=PATIENCE)
            except grpc.aio.AioRpcError as error:
                refused = from_rpc_error(error)
                assert isinstance(refused, Unavailable)
                return refused


@contextmanager
def family(served: Served) -> Iterator[list[psutil.Process]]:
    """The router and the two workers; here they are killed in the end, whatever is tested."""
    children = psutil.Process(served.process.pid).children(recursive=True)
    try:
        assert len(children) == 3
        yield children
    finally:
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()


async def test_sigterm_lets_running_streams_end(model: Path, tmp_path: Path) -> None:
    with (
        serving(model, tmp_path / "log", "--workers", "2", **STEADY) as served,
        family(served) as children,
    ):
        async with AsyncClient(served.address) as client:
            undisturbed = await ends(await read_all(client, JOBS, 0))
            readings = await read_all(client, JOBS, 20)
            served.process.send_signal(signal.SIGTERM)
            refused = await refusal(served.address)
            assert_some_run(readings)
            assert refused.reason == "DRAINING"
            assert refused.retry_after
            assert list(map(told, await ends(readings))) == list(map(told, undisturbed))
        assert await asyncio.to_thread(served.process.wait, 10) == 0
        assert psutil.wait_procs(children, timeout=0)[1] == []


async def test_streams_that_outlast_the_drain_timeout_are_told(model: Path, tmp_path: Path) -> None:
    environment = {**STEADY, "MILI_DRAIN_TIMEOUT": "0.2"}
    with (
        serving(model, tmp_path / "log", "--workers", "2", **environment) as served,
        family(served) as children,
    ):
        async with AsyncClient(served.address) as client:
            readings = await read_all(client, ENDLESS, 1)
            served.process.send_signal(signal.SIGTERM)
            for reading in readings:
                with pytest.raises(Unavailable) as failure:
                    await reading.end()
                assert failure.value.reason == "DRAINING"
        assert await asyncio.to_thread(served.process.wait, 10) == 0
        assert psutil.wait_procs(children, timeout=0)[1] == []


async def test_no_process_is_left_when_serve_is_killed(model: Path, tmp_path: Path) -> None:
    with (
        serving(model, tmp_path / "log", "--workers", "2", **STEADY) as served,
        family(served) as children,
    ):
        async with AsyncClient(served.address) as client:
            readings = await read_all(client, ENDLESS, 1)
            served.process.kill()
            for reading in readings:
                with pytest.raises(Unavailable):
                    await reading.end()
        _, alive = await asyncio.to_thread(psutil.wait_procs, children, 10)
        assert alive == []
