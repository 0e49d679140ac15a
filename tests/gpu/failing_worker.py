"""A GPU worker one of whose kernels writes where it may not; takes the model's folder.

Owns a connection without a socket. Everything else is the worker's own.
"""

from __future__ import annotations

import ctypes
import queue
import sys
from pathlib import Path
from typing import Any

from mili.hub.folder import read_model_folder
from mili.internal.v1.step_pb2 import Admission, StepCommand, Welcome
from mili.kernels.module import Grid, load
from mili.worker.config import WorkerConfig
from mili.worker.main import Runner, load_runner, serve
from mili.worker.progress import Progress
from mili.worker.session import Command, Opened
from tests.gpu.steps import SETTINGS

_ADMITTED = Admission(row=1, token_ids=b"\1\0\0\0" * 20)
_STEPS = (
    StepCommand(
        step=1,
        admissions=[_ADMITTED],
        block_rows=[1, 1],
        block_ids=[5, 9],
        rows=[1],
        starts=[0],
        num_tokens=[20],
    ),
    StepCommand(step=2, rows=[1], starts=[20], num_tokens=[1]),
    StepCommand(step=3, rows=[1], starts=[21], num_tokens=[1]),
)


class Events:
    """The part of Connection that the step loop uses."""

    epoch = 1

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._inbox.put(Opened(1, Welcome()))
        for step in _STEPS:
            self._inbox.put(Command(1, step))

    def receive(self) -> Any:  # noqa: ANN401
        event = self._inbox.get()
        if isinstance(event, Exception):
            raise event
        return event

    def send(self, epoch: int, body: object) -> None:
        print("sent", type(body).__name__, flush=True)

    def interrupt(self, error: Exception) -> None:
        self._inbox.put(error)


def load_failing(folder: Path) -> Runner:
    config = WorkerConfig(model=str(folder), enforce_eager=True, **SETTINGS)
    runner: Any = load_runner(read_model_folder(folder), config)
    start = runner.start

    def start_and_break(command: StepCommand) -> Any:  # noqa: ANN401
        pending = start(command)
        if command.step == 2:
            nowhere = ctypes.c_void_p(8)
            load("step")["end_step"].launch(Grid((1, 1, 1), 32), *[nowhere] * 5)
        return pending

    runner.start = start_and_break
    return runner


if __name__ == "__main__":
    events: Any = Events()
    sys.exit(serve(events, Progress(), lambda welcome: load_failing(Path(sys.argv[1]))))
