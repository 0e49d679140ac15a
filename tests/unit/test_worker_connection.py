"""Threads share the worker's socket: no frame is lost, doubled, out of order or left lying."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from mili.internal.v1 import step_pb2 as pb
from mili.worker import connection as connection_module
from mili.worker.connection import Connection
from mili.worker.progress import Progress
from mili.worker.session import Command, Opened

EPOCH = 5
STEPS = 3000
# Far more than a test takes: what only a heartbeat would carry along does not arrive.
NEVER = 60.0


class Router:
    """One worker's."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)  # or it drops what the worker does not take at once
        self.socket.setsockopt(zmq.RCVTIMEO, 5000)
        self.socket.bind(address)
        self._sequence = 0

    def welcome(self) -> None:
        self._identity, hello = self.socket.recv_multipart()
        assert pb.WorkerFrame.FromString(hello).HasField("hello")
        self.send(welcome=pb.Welcome())

    def send(self, **body: object) -> None:
        self._sequence += 1
        frame = pb.RouterFrame(epoch=EPOCH, sequence=self._sequence, **body)  # type: ignore[arg-type]
        self.socket.send_multipart([self._identity, frame.SerializeToString()])

    def receive(self) -> pb.WorkerFrame:
        frame = pb.WorkerFrame.FromString(self.socket.recv_multipart()[1])
        assert frame.epoch == EPOCH
        return frame

    def close(self) -> None:
        self.socket.close()
        self._context.term()


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Router]:
    router = Router(f"ipc://{tmp_path}/link")
    yield router
    router.close()


@pytest.fixture
def connection(
    router: Router, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Connection]:
    """In an epoch, and without any heartbeat after the first."""
    monkeypatch.setattr(connection_module, "HEARTBEAT_SECONDS", NEVER)
    connection = Connection(f"ipc://{tmp_path}/link", pb.Hello(worker="w"), Progress())
    router.welcome()
    assert isinstance(connection.receive(), Opened)
    yield connection
    connection.close()


def take_results(router: Router, count: int) -> None:
    """They must be steps 1, 2, 3, ... in frames that are numbered without a gap."""
    for number in range(1, count + 1):
        frame = router.receive()
        assert (frame.sequence, frame.result.step) == (number, number)


def test_results_and_commands_cross_without_waiting_for_each_other(
    router: Router, connection: Connection
) -> None:
    """Each direction as fast as it goes, from a thread of its own."""

    def send_results() -> None:
        for step in range(1, STEPS + 1):
            connection.send(EPOCH, pb.StepResult(step=step, token_ids=range(20)))

    received: list[int] = []

    def receive_commands() -> None:
        for _ in range(STEPS):
            event = connection.receive()
            assert isinstance(event, Command)
            received.append(event.step.step)

    threads = [
        threading.Thread(target=each, daemon=True) for each in (send_results, receive_commands)
    ]
    for thread in threads:
        thread.start()
    for step in range(1, STEPS + 1):
        router.send(step=pb.StepCommand(step=step))
    take_results(router, STEPS)
    for thread in threads:
        thread.join(20)
    assert received == [*range(1, STEPS + 1)]


def test_no_frame_waits_for_the_next(router: Router, connection: Connection) -> None:
    """The router answers every result with a command and every command brings a result, while
    another thread sends what nobody answers: a descriptor's news must not be lost to it."""
    noise = threading.Event()

    def make_noise() -> None:
        while not noise.is_set():
            connection.send(EPOCH, pb.Failure(message="noise"))

    def answer() -> None:
        for _ in range(STEPS):
            event = connection.receive()
            assert isinstance(event, Command)
            connection.send(EPOCH, pb.StepResult(step=event.step.step))

    threads = [threading.Thread(target=each, daemon=True) for each in (make_noise, answer)]
    for thread in threads:
        thread.start()
    try:
        sequence = 0
        for step in range(1, STEPS + 1):
            router.send(step=pb.StepCommand(step=step))
            while True:
                frame = router.receive()
                sequence += 1
                assert frame.sequence == sequence
                if frame.HasField("result"):
                    assert frame.result.step == step
                    break
    finally:
        noise.set()
    for thread in threads:
        thread.join(20)


def test_what_a_slow_router_does_not_take_goes_later(
    router: Router, connection: Connection
) -> None:
    """More than the queues hold, without a wait in send; close takes the rest along."""
    count = 6 * connection_module.HIGH_WATER_MARK
    for step in range(1, count + 1):
        connection.send(EPOCH, pb.StepResult(step=step, token_ids=[1 << 20] * 2000))
    assert connection._session.outgoing, "all fitted the queues: the test shows nothing"
    take_results(router, count)


def test_after_close_nothing_is_sent_and_nothing_fails(
    router: Router, connection: Connection
) -> None:
    connection.send(EPOCH, pb.StepResult(step=1))
    connection.close()
    connection.send(EPOCH, pb.StepResult(step=2))
    take_results(router, 1)
    router.socket.setsockopt(zmq.RCVTIMEO, 100)
    with pytest.raises(zmq.Again):
        router.receive()


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="nonsense is not an address"):
        Connection("nonsense", pb.Hello(), Progress())
