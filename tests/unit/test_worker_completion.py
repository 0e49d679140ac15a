"""Results go back in order; after a step that failed nothing goes back, and the step loop ends."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any, cast

import pytest
import structlog

from mili.internal.v1.step_pb2 import (
    FAILURE_KIND_INTERNAL,
    WORKER_PHASE_IDLE,
    WORKER_PHASE_STEPPING,
    Failure,
    Hello,
    StepCommand,
    StepResult,
)
from mili.worker import completion
from mili.worker.completion import Completion, DoneStep, StepError
from mili.worker.connection import Connection
from mili.worker.progress import Progress

EPOCH = 7


class FakeConnection:
    """Keeps what it is given."""

    epoch = EPOCH

    def __init__(self) -> None:
        self.sent: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self.interrupts: list[Exception] = []

    def send(self, epoch: int, body: StepResult | Failure) -> None:
        self.sent.put((epoch, body))

    def interrupt(self, error: Exception) -> None:
        self.interrupts.append(error)

    def steps_sent(self) -> list[int]:
        """Of all that was sent since the last call."""
        return [self.sent.get()[1].step for _ in range(self.sent.qsize())]


class HeldStep:
    """Ends when it is let go, with a result or an error."""

    def __init__(self, step: int, error: Exception | None = None) -> None:
        self.go = threading.Event()
        self._step, self._error = step, error

    def result(self) -> StepResult:
        assert self.go.wait(10)
        if self._error is not None:
            raise self._error
        return StepResult(step=self._step)


class Harness:
    def __init__(self) -> None:
        self.connection, self.progress = FakeConnection(), Progress()
        self.completion = Completion(cast(Connection, self.connection), self.progress)

    def put(self, step: int, error: Exception | None = None, epoch: int = EPOCH) -> HeldStep:
        held = HeldStep(step, error)
        command = StepCommand(step=step, rows=[4, 9], starts=[100, 0], num_tokens=[1, 30])
        self.progress.start(step)
        self.completion.put(epoch, command, held)
        return held


def test_results_are_sent_in_order_each_in_its_epoch() -> None:
    harness = Harness()
    steps = [harness.put(step, epoch=step * 10) for step in (1, 2, 3)]
    steps[2].go.set()
    steps[1].go.set()
    assert harness.connection.sent.empty(), "a later step overtook the first"
    steps[0].go.set()
    harness.completion.wait()
    sent = [harness.connection.sent.get_nowait() for _ in steps]
    assert sent == [(step * 10, StepResult(step=step)) for step in (1, 2, 3)]
    assert harness.progress.finished_step == 3
    harness.completion.close()


def test_the_worker_is_idle_only_when_nothing_is_left_to_do() -> None:
    harness = Harness()
    first, second = harness.put(1), harness.put(2)
    first.go.set()
    assert harness.connection.sent.get(timeout=10)[1].step == 1
    assert harness.progress.heartbeat(0.0).phase == WORKER_PHASE_STEPPING, "a step is in flight"
    second.go.set()
    harness.completion.wait()
    assert harness.progress.heartbeat(0.0).phase == WORKER_PHASE_IDLE
    harness.completion.close()


def test_a_step_that_never_ends_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness()
    held = harness.put(1)
    monkeypatch.setattr(completion, "HANG_SECONDS", 0.01)
    codes: list[int] = []
    monkeypatch.setattr(completion.os, "_exit", codes.append)
    harness.completion.wait()
    assert codes == [1]
    held.go.set()
    monkeypatch.undo()
    harness.completion.close()


def test_a_command_that_fits_nothing_is_reported_all_the_same() -> None:
    connection: Any = FakeConnection()
    for command in (StepCommand(step=4), StepCommand(step=4, rows=[1], starts=[3])):
        completion.report_failure(connection, command, ValueError("row columns differ"))
        assert connection.steps_sent() == [4]


def test_wait_returns_when_every_step_has_ended() -> None:
    harness = Harness()
    waited = threading.Event()

    def wait() -> None:
        harness.completion.wait()
        waited.set()

    first, second = harness.put(1), harness.put(2)
    thread = threading.Thread(target=wait)
    thread.start()
    first.go.set()
    assert harness.connection.sent.get(timeout=10)[1].step == 1
    assert not waited.is_set()
    second.go.set()
    assert waited.wait(10)
    assert harness.connection.steps_sent() == [2]
    thread.join()
    harness.completion.wait()  # nothing was put: at once
    harness.completion.close()


def test_close_sends_what_is_left_and_ends_the_thread() -> None:
    harness = Harness()
    steps = [harness.put(step) for step in (1, 2)]
    closing = threading.Thread(target=harness.completion.close)
    closing.start()
    for step in steps:
        step.go.set()
    closing.join(10)
    assert not closing.is_alive()
    assert not harness.completion._thread.is_alive()
    assert harness.connection.steps_sent() == [1, 2]


def test_a_step_that_failed_is_told_once_and_nothing_follows() -> None:
    harness = Harness()
    with structlog.testing.capture_logs() as lines:
        steps = [
            harness.put(1),
            harness.put(2, RuntimeError("the device is lost\nand more")),
            harness.put(3),
            harness.put(4, RuntimeError("the same again")),
        ]
        for step in steps:
            step.go.set()
        harness.completion.wait()
    assert harness.connection.sent.get_nowait() == (EPOCH, StepResult(step=1))
    epoch, failure = harness.connection.sent.get_nowait()
    assert isinstance(failure, Failure) and epoch == EPOCH
    assert (failure.kind, failure.step) == (FAILURE_KIND_INTERNAL, 2)
    assert "RuntimeError" in failure.message and "lost" not in failure.message
    assert harness.connection.sent.empty()
    assert [type(error) for error in harness.connection.interrupts] == [StepError]
    assert harness.progress.finished_step == 1
    harness.completion.close()

    assert [line["log_level"] for line in lines] == ["error", "critical"]
    assert {line["step"] for line in lines} == {2}
    assert isinstance(lines[0]["exc_info"], RuntimeError), "the traceback is lost"
    ending = lines[1]
    assert ending["error"] == "RuntimeError: the device is lost"
    assert (ending["rows"], ending["tokens"], ending["longest_context"]) == (2, 31, 101)
    assert "kernel" not in ending


class LaunchError(RuntimeError):
    kernel = "norm"


@pytest.mark.parametrize(
    ("error", "kernel"),
    [(LaunchError("x"), "norm"), (RuntimeError("CUDA error: x"), "CUDA_LAUNCH_BLOCKING")],
)
def test_the_log_says_which_kernel_failed_or_how_to_find_out(error: Exception, kernel: str) -> None:
    harness = Harness()
    with structlog.testing.capture_logs() as lines:
        harness.put(1, error).go.set()
        harness.completion.wait()
    harness.completion.close()
    assert kernel in lines[-1]["kernel"]


def test_a_step_that_failed_ends_the_step_loop(tmp_path: Path) -> None:
    progress = Progress()
    connection = Connection(f"ipc://{tmp_path}/link", Hello(), progress)
    completion = Completion(connection, progress)
    held = HeldStep(1, RuntimeError("x"))
    completion.put(0, StepCommand(step=1, rows=[1], starts=[0], num_tokens=[1]), held)
    completion.put(0, StepCommand(step=2), DoneStep(StepResult(step=2)))
    held.go.set()
    with structlog.testing.capture_logs(), pytest.raises(StepError):
        connection.receive()
    completion.close()
    connection.close()
