"""A worker's life around its steps: loading, health, hanging and ending; the loop in a thread."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mili.internal.v1 import step_pb2 as pb
from mili.router.config import RouterConfig
from mili.worker.completion import DoneStep
from mili.worker.connection import Connection
from mili.worker.health import HealthServer
from mili.worker.main import Runner, serve
from mili.worker.progress import Progress
from tests.link_router import Spawn, ended, make_command, router, spawner
from tests.link_worker import HELLO, EchoRunner

Load = Callable[[pb.Welcome], Runner]


class Worker:
    """A worker in a thread; `outcome` is its exit code, or what it raised."""

    def __init__(self, address: str, load: Load, on_serving: Callable[[bool], None]) -> None:
        hello = pb.Hello(worker="w", instance=str(id(self)))
        hello.MergeFrom(HELLO)
        self.progress = Progress()
        self.connection = Connection(address, hello, self.progress, on_serving=on_serving)
        self.outcome: int | Exception | None = None
        self._load = load
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.outcome = serve(self.connection, self.progress, self._load)
        except ValueError as error:
            self.outcome = error
        finally:
            self.connection.close()

    async def ended(self) -> int | Exception | None:
        await asyncio.to_thread(self._thread.join, 10)
        return self.outcome

    def end(self) -> None:
        self.connection.stop("drain")
        self._thread.join(10)


@contextmanager
def running(
    address: str, load: Load, on_serving: Callable[[bool], None] = lambda serving: None
) -> Iterator[Worker]:
    worker = Worker(address, load, on_serving)
    try:
        yield worker
    finally:
        worker.end()


@pytest.fixture
def ipc(tmp_path: Path) -> RouterConfig:
    return RouterConfig(model="m", worker_link=f"ipc://{tmp_path}/link/workers.sock")


class HangingRunner(EchoRunner):
    """Step 2 takes until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()
        self.executed: list[int] = []

    def start(self, command: pb.StepCommand) -> DoneStep:
        self.executed.append(command.step)
        result = super().start(command)
        if command.step == 2:
            self.released.wait(20)
        return result


async def test_a_hung_step_is_noticed_and_its_late_result_is_void(ipc: RouterConfig) -> None:
    runner = HangingRunner()
    greeting = threading.Event()

    def on_serving(serving: bool) -> None:
        if not serving:
            greeting.set()

    async with router(ipc) as here:
        with running(ipc.worker_link, lambda welcome: runner, on_serving) as worker:
            group, _ = await here.expect("ready")
            await here.step(group, 1)
            greeting.clear()
            hung_at = time.monotonic()
            group.send(make_command(2), [True], hung_at)
            group.send(make_command(3), [True], hung_at)
            _, reason = await here.expect("lost")
            assert "did not finish step 2" in str(reason)
            assert 1.0 < time.monotonic() - hung_at < 1.5
            assert worker.progress.finished_step == 1
            # No heartbeat of an epoch that is over is answered: the worker says Hello.
            assert await asyncio.to_thread(greeting.wait, 5)
            runner.released.set()
            await here.expect("ready")
            assert worker.progress.finished_step == 0
            await here.step(group, 1)
            assert runner.executed == [1, 2, 1], "step 3 was of the old epoch"


async def test_a_model_that_does_not_load_is_reported_to_router_and_caller(
    ipc: RouterConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    def load(welcome: pb.Welcome) -> Runner:
        raise ValueError("model.safetensors is truncated")

    async with router(ipc):
        with running(ipc.worker_link, load) as worker:
            assert str(await worker.ended()) == "model.safetensors is truncated"
        await asyncio.sleep(0.1)
    assert "worker w left: model.safetensors is truncated" in capfd.readouterr().out


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    with spawner() as start:
        yield start


async def test_sigterm_ends_loading_at_once(ipc: RouterConfig, spawn: Spawn) -> None:
    async with router(ipc):
        process = spawn(ipc.worker_link, "slow")
        assert process.stdout
        while await asyncio.to_thread(process.stdout.readline) != "loading\n":
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert await ended(process) == 0


async def test_sigterm_finishes_the_steps_that_wait(ipc: RouterConfig, spawn: Spawn) -> None:
    async with router(ipc) as here:
        process = spawn(ipc.worker_link)
        group, _ = await here.expect("ready")
        for step in (1, 2, 3):
            group.send(make_command(step), [True], time.monotonic())
        await here.expect("result")
        process.send_signal(signal.SIGTERM)
        await here.expect("result")
        await here.expect("result")
        await here.expect("lost")
        assert await ended(process) == 0


async def test_health_tells_whether_the_router_can_use_the_worker(ipc: RouterConfig) -> None:
    health = HealthServer(0)
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_serving(serving: bool) -> None:
        health.set_ready(serving)
        loop.call_soon_threadsafe(changed.set)

    async with grpc.aio.insecure_channel(f"127.0.0.1:{health.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def check(service: str) -> str:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

        with running(ipc.worker_link, lambda welcome: EchoRunner(), on_serving):
            assert [await check(name) for name in ("liveness", "readiness", "")] == [
                "SERVING",
                "NOT_SERVING",
                "NOT_SERVING",
            ]
            async with router(ipc) as here:
                await here.expect("ready")
                await asyncio.wait_for(changed.wait(), 5)
                assert [await check(name) for name in ("readiness", "")] == ["SERVING"] * 2
                changed.clear()
            await asyncio.wait_for(changed.wait(), 5)  # the router is gone
            assert await check("readiness") == "NOT_SERVING"
            assert await check("liveness") == "SERVING"
    health.close()


def test_a_health_port_in_use() -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on health port {port}"):
            HealthServer(port)
