"""The worker link with real sockets and real worker processes, whose runner only answers."""

from __future__ import annotations

import asyncio
import select
import signal
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from mili.cli.keygen import generate_keys
from mili.router.config import RouterConfig
from mili.router.workers import WorkerState
from tests.link_router import Spawn, ended, make_command, router, spawner


@pytest.fixture
def ipc(tmp_path: Path) -> RouterConfig:
    return RouterConfig(model="m", worker_link=f"ipc://{tmp_path}/link/workers.sock")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    generate_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    with spawner() as start:
        yield start


async def test_steps_over_ipc_and_a_clean_end(ipc: RouterConfig, spawn: Spawn) -> None:
    async with router(ipc) as here:
        process = spawn(ipc.worker_link)
        group, _ = await here.expect("ready")
        for step in range(1, 13):
            await here.step(group, step, num_rows=256)
        process.terminate()
        _, reason = await here.expect("lost")
        assert "told to stop" in str(reason)
        assert await ended(process) == 0


async def test_a_failed_step_ends_the_worker_with_a_reason(ipc: RouterConfig, spawn: Spawn) -> None:
    async with router(ipc) as here:
        process = spawn(ipc.worker_link)
        group, _ = await here.expect("ready")
        for step in range(1, 13):
            await here.step(group, step)
        group.send(make_command(13), [True], time.monotonic())
        _, reason = await here.expect("lost")
        assert reason == "worker w failed: KeyError in step 13"
        assert await ended(process) == 1


async def test_a_worker_of_another_model_is_refused(ipc: RouterConfig, spawn: Spawn) -> None:
    async with router(ipc, interface=b"x" * 32) as here:
        process = spawn(ipc.worker_link)
        assert await ended(process) == 78
        assert process.stdout
        assert "another model" in process.stdout.read()
        assert here.events.empty()


async def test_a_killed_worker_is_noticed_and_its_successor_takes_over(
    ipc: RouterConfig, spawn: Spawn
) -> None:
    async with router(ipc) as here:
        process = spawn(ipc.worker_link)
        group, _ = await here.expect("ready")
        await here.step(group, 1)
        process.kill()
        killed_at = time.monotonic()
        await here.expect("lost")
        assert time.monotonic() - killed_at < 1.5
        assert group.state == WorkerState.LOST
        spawn(ipc.worker_link)
        again, _ = await here.expect("ready")
        assert again is group
        await here.step(group, 1)


async def test_a_stopped_worker_is_noticed_and_comes_back(ipc: RouterConfig, spawn: Spawn) -> None:
    async with router(ipc) as here:
        process = spawn(ipc.worker_link)
        group, _ = await here.expect("ready")
        await here.step(group, 1)
        process.send_signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        group.send(make_command(2), [True], stopped_at)
        await here.expect("lost")
        assert time.monotonic() - stopped_at < 1.5
        process.send_signal(signal.SIGCONT)
        await here.expect("ready")
        await here.step(group, 1)


async def test_a_new_process_with_the_same_name_takes_over_from_a_live_one(
    ipc: RouterConfig, spawn: Spawn
) -> None:
    async with router(ipc) as here:
        older = spawn(ipc.worker_link)
        await here.expect("ready")
        spawn(ipc.worker_link)
        await here.expect("lost")
        group, _ = await here.expect("ready")
        assert await ended(older) == 78
        await here.step(group, 1)
        assert here.events.empty()


async def test_a_worker_outlives_its_router(ipc: RouterConfig, spawn: Spawn) -> None:
    process = spawn(ipc.worker_link)
    for _ in range(2):
        async with router(ipc) as here:
            group, _ = await here.expect("ready")
            await here.step(group, 1)
    assert process.poll() is None


async def test_two_workers_with_names_of_their_own(ipc: RouterConfig, spawn: Spawn) -> None:
    async with router(ipc) as here:
        for name in ("a", "b"):
            spawn(ipc.worker_link, name)
        groups = [(await here.expect("ready"))[0] for _ in "ab"]
        assert {group.name for group in groups} == {"a", "b"}
        for group in groups:
            await here.step(group, 1)


async def test_curve_over_tcp(keys: Path, tmp_path: Path, spawn: Spawn) -> None:
    config = RouterConfig(model="m", worker_link="tcp://0.0.0.0:0", worker_keys=keys)
    stranger = tmp_path / "stranger"
    generate_keys(stranger)
    (stranger / "router.pub").write_bytes((keys / "router.pub").read_bytes())
    async with router(config) as here:
        address = "tcp://127.0.0.1:" + here.link.endpoint.rpartition(":")[2]
        without_keys = spawn(address, "a")
        unknown_key = spawn(address, "b", str(stranger))
        spawn(address, "w", str(keys))
        group, _ = await here.expect("ready")
        await here.step(group, 1)
        await asyncio.sleep(0.5)  # time in which the others would have got in
        assert [info.name for info in here.workers.info(time.monotonic())] == ["w"]
        assert here.workers.ignored_frames == 0
        assert without_keys.poll() is None
        assert unknown_key.poll() is None
        (keys / "authorized" / "b.pub").write_bytes(
            (stranger / "authorized" / "worker.pub").read_bytes()
        )
        group, _ = await here.expect("ready")
        assert group.name == "b", "a key counts as soon as it is there"


async def test_garbage_disturbs_nobody(spawn: Spawn) -> None:
    config = RouterConfig(model="m", worker_link="tcp://127.0.0.1:0")
    async with router(config) as here:
        spawn(here.link.endpoint)
        group, _ = await here.expect("ready")
        port = int(here.link.endpoint.rpartition(":")[2])
        with (
            zmq.Context() as context,
            context.socket(zmq.DEALER) as dealer,
            socket.create_connection(("127.0.0.1", port)) as raw,
        ):
            dealer.linger = 0
            dealer.connect(here.link.endpoint)
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"\xff" * 100_000)
            for frame in (b"", b"\xff" * 1000, b"garbage", b"\x00" * (17 << 20)):
                dealer.send(frame)
                dealer.send_multipart([frame[:99], b"two", b"parts"])
            for step in range(1, 11):
                await here.step(group, step)
                await asyncio.sleep(0.03)
        assert here.workers.ignored_frames > 0
        assert here.events.empty()


async def test_a_frame_that_came_while_we_sent_is_not_left_waiting(ipc: RouterConfig) -> None:
    async with router(ipc) as here:
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.connect(ipc.worker_link)
            dealer.send(b"garbage")
            async with asyncio.timeout(5):
                while here.workers.ignored_frames < 1:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            for count in range(2, 20):
                dealer.send(b"garbage")
                # Blocks the loop, so that it does not see its descriptor's signal before we send.
                select.select([here.link._descriptor], [], [], 5)
                here.link.send(b"nobody", b"takes the descriptor's signal away")
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                assert here.workers.ignored_frames == count


async def test_a_round_trip_costs_little(ipc: RouterConfig, spawn: Spawn) -> None:
    async with router(ipc) as here:
        spawn(ipc.worker_link)
        group, _ = await here.expect("ready")
        times = []
        for step in range(1, 13):
            started = time.perf_counter()
            await here.step(group, step, num_rows=256)
            times.append(time.perf_counter() - started)
        # About 0.4 ms on an idle machine; a machine under test is none.
        assert statistics.median(times) < 0.02
