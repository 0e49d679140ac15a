"""Steps that were started, and their results on the way back to the router.

Owns the thread that waits for steps to end, in order, while the step loop starts the next. Does
not know how a step is computed.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

import structlog

from mili.internal.v1.step_pb2 import (
    FAILURE_KIND_INTERNAL,
    Failure,
    StepCommand,
    StepResult,
)
from mili.worker.connection import Connection
from mili.worker.progress import Progress

log = structlog.get_logger()

# Far longer than any step: what has not ended by then never will, and nothing can interrupt it.
HANG_SECONDS = 60.0


OnStep = Callable[[StepCommand, StepResult], None]


class PendingStep(Protocol):
    """A step that was started."""

    def result(self) -> StepResult:
        """Wait for its end, from any thread."""


class DoneStep(NamedTuple):
    """A step that ended before `start` returned."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value


class StepError(Exception):
    """A step failed, and was reported: the table cannot be trusted any more."""


class _Started(NamedTuple):
    epoch: int
    command: StepCommand
    pending: PendingStep


class Completion:
    """put and wait are the step loop's; the thread does the rest."""

    def __init__(
        self,
        connection: Connection,
        progress: Progress,
        on_step: OnStep = lambda command, result: None,
    ) -> None:
        """on_step hears, on the thread, of every step that ended well."""
        self._on_step = on_step
        self._connection = connection
        self._progress = progress
        self._started: queue.Queue[_Started | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="completion", daemon=True)
        self._thread.start()

    def put(self, epoch: int, command: StepCommand, pending: PendingStep) -> None:
        self._started.put(_Started(epoch, command, pending))

    def wait(self) -> None:
        """Return when every step that was put has ended. A device that hangs ends the process."""
        ended = self._started.all_tasks_done
        with ended:
            if not ended.wait_for(lambda: not self._started.unfinished_tasks, HANG_SECONDS):
                self._give_up()

    def close(self) -> None:
        """Send what is still to be sent, and end the thread."""
        self._started.put(None)
        self.wait()
        self._thread.join()

    def _run(self) -> None:
        failed = False
        while True:
            started = self._started.get()
            try:
                if started is None:
                    return
                # What follows a step that failed means nothing.
                failed = failed or not self._complete(started)
            finally:
                self._started.task_done()

    def _give_up(self) -> None:
        log.critical("the worker ends: a step does not", seconds=HANG_SECONDS)
        os._exit(1)

    def _complete(self, started: _Started) -> bool:
        step = started.command.step
        try:
            result = started.pending.result()
        except Exception as error:
            self._connection.interrupt(report_failure(self._connection, started.command, error))
            return False
        self._progress.finish(step)
        self._connection.send(started.epoch, result)
        self._on_step(started.command, result)
        return True


def report_failure(connection: Connection, command: StepCommand, error: Exception) -> StepError:
    """Tell the router of a step that failed, and log it; returns what ends the step loop."""
    failure = Failure(
        kind=FAILURE_KIND_INTERNAL,
        message=f"{type(error).__name__} in step {command.step}",
        step=command.step,
    )
    connection.send(connection.epoch, failure)
    # The columns of a command that does not fit may be of unequal length.
    contexts = zip(command.starts, command.num_tokens, strict=False)
    log.error("step failed", step=command.step, exc_info=error)
    log.critical(
        "the worker ends: what it holds cannot be trusted any more",
        error=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
        step=command.step,
        rows=len(command.rows),
        tokens=sum(command.num_tokens),
        longest_context=max(map(sum, contexts), default=0),
        **_kernel(error),
    )
    return StepError()


def _kernel(error: Exception) -> dict[str, str]:
    """Which kernel failed, where a GPU did."""
    if kernel := getattr(error, "kernel", ""):
        return {"kernel": kernel}
    if "CUDA" in str(error):
        return {"kernel": "unknown: MILI_ENFORCE_EAGER=1 and CUDA_LAUNCH_BLOCKING=1 names it"}
    return {}
