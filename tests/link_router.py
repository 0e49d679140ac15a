"""A router's end of the worker link that a test can drive, and worker processes for it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from mili.internal.v1 import step_pb2 as pb
from mili.router.config import RouterConfig
from mili.router.worker_link import WorkerLink
from mili.router.workers import WorkerGroup, Workers

INTERFACE = b"i" * 32
SCRIPT = Path(__file__).parent / "link_worker.py"

Spawn = Callable[..., subprocess.Popen[str]]


class Router:
    """A link, and events that a test can wait for."""

    def __init__(self, config: RouterConfig, interface: bytes = INTERFACE) -> None:
        self.workers = Workers(self, interface_sha256=interface)
        self.faults: list[Exception] = []
        self.link = WorkerLink(config, self.workers, self.faults.append)
        self.events: asyncio.Queue[tuple[str, WorkerGroup, object]] = asyncio.Queue()

    def on_ready(self, group: WorkerGroup) -> None:
        self.events.put_nowait(("ready", group, None))

    def on_result(self, group: WorkerGroup, result: pb.StepResult) -> None:
        self.events.put_nowait(("result", group, result))

    def on_prepared(self, group: WorkerGroup, prepared: pb.Prepared) -> None:
        self.events.put_nowait(("prepared", group, prepared))

    def on_lost(self, group: WorkerGroup, reason: str, *, died: bool) -> None:
        self.events.put_nowait(("lost", group, reason))

    async def expect(self, name: str, seconds: float = 10.0) -> tuple[WorkerGroup, object]:
        event, group, value = await asyncio.wait_for(self.events.get(), seconds)
        assert event == name, (event, value)
        return group, value

    async def step(self, group: WorkerGroup, number: int, num_rows: int = 1) -> None:
        group.send(make_command(number, num_rows), [True] * num_rows, time.monotonic())
        _, result = await self.expect("result")
        assert isinstance(result, pb.StepResult)
        assert list(result.token_ids) == list(range(num_rows))


def make_command(step: int, num_rows: int = 1) -> pb.StepCommand:
    return pb.StepCommand(
        step=step,
        rows=range(1, num_rows + 1),
        starts=range(num_rows),
        num_tokens=[1] * num_rows,
    )


@asynccontextmanager
async def router(config: RouterConfig, interface: bytes = INTERFACE) -> AsyncIterator[Router]:
    made = Router(config, interface)
    made.link.start()
    try:
        yield made
    finally:
        made.link.close()


@contextmanager
def spawner() -> Iterator[Spawn]:
    """Start worker processes that end with the block at the latest."""
    with ExitStack() as stack:

        def start(address: str, *arguments: str) -> subprocess.Popen[str]:
            command = [sys.executable, str(SCRIPT), address, *arguments]
            process = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)
            return process

        yield start


async def ended(process: subprocess.Popen[str]) -> int:
    return await asyncio.to_thread(process.wait, 10)
