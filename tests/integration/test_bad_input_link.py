"""Strangers on the worker link: garbage changes nothing, and a worker of another model is told.

Router and worker are processes of their own here, over both transports of the link.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import zmq

from mili.internal.v1 import step_pb2
from tests.bystander import Bystander
from tests.model_folders import make_model_folder
from tests.serving import MILI, Apart, free_port, serving_apart
from tests.streams import PATIENCE, Job

# How a ZMTP 3.1 peer without security introduces itself: signature, version, mechanism, filler.
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)


def command(name: bytes, body: bytes) -> bytes:
    data = bytes([len(name)]) + name + body
    return b"\x04" + bytes([len(data)]) + data


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("link") / "tiny")


@pytest.fixture(scope="module", params=["ipc", "tcp"])
def link(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "tcp":
        return f"tcp://127.0.0.1:{free_port()}"
    return f"ipc://{tmp_path_factory.mktemp('ipc')}/workers"


@pytest.fixture(scope="module")
def apart(model: Path, link: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    with serving_apart(model, link, tmp_path_factory.mktemp("log") / "log") as apart:
        yield apart


@pytest.fixture(scope="module")
def bystander(apart: Apart) -> Iterator[Bystander]:
    with Bystander(apart.address, Job(tuple(range(100, 120)), max_tokens=80)) as bystander:
        yield bystander


@pytest.fixture(autouse=True)
def undisturbed(bystander: Bystander) -> Iterator[None]:
    """A stream runs before, during and after every test of this file."""
    bystander.advance()
    yield
    bystander.advance()


@pytest.fixture
def stranger(link: str) -> Iterator[socket.socket]:
    """A connection to the link without any ZeroMQ."""
    transport, _, address = link.partition("://")
    if transport == "tcp":
        host, port = address.split(":")
        connection = socket.create_connection((host, int(port)))
    else:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
    connection.settimeout(PATIENCE)
    with connection:
        yield connection


def read_until(connection: socket.socket, wanted: bytes) -> None:
    answer = b""
    while wanted not in answer:
        answer += (received := connection.recv(4096))
        assert received, f"closed after {answer!r}"


def is_hung_up_on(connection: socket.socket, data: bytes) -> None:
    """Send bytes and wait for the other side to close, be it before it has them all.

    It must not take as long as ZeroMQ's own heartbeat, which gives up a silent peer after 6 s.
    """
    end = time.monotonic() + 4
    with suppress(ConnectionError):
        connection.sendall(data)
        while connection.recv(4096):
            assert time.monotonic() < end, "the router keeps the connection"
    assert time.monotonic() < end, "the router kept the connection"


def test_bytes_that_are_not_zeromq(stranger: socket.socket) -> None:
    is_hung_up_on(stranger, b"GET / HTTP/1.1\r\n\r\n" + b"\xff" * 100_000)


def test_a_frame_that_claims_32_megabytes(stranger: socket.socket) -> None:
    """From a peer that did everything right until then."""
    dealer = b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
    stranger.sendall(GREETING + command(b"READY", dealer))
    read_until(stranger, b"READY")
    stranger.sendall(command(b"PING", b"\0\0"))
    read_until(stranger, b"PONG")
    is_hung_up_on(stranger, b"\x02" + struct.pack(">Q", 2**25) + b"x" * 1000)


def test_a_zeromq_peer_that_sends_garbage(link: str, apart: Apart) -> None:
    hello = step_pb2.WorkerFrame(
        hello=step_pb2.Hello(
            protocol_min=1,
            protocol_max=1,
            worker="stranger",
            instance="1",
            world_size=1,
            interface_sha256=b"i" * 32,
            weights_sha256=b"w" * 32,
        )
    )
    unnamed = step_pb2.WorkerFrame()
    unnamed.CopyFrom(hello)
    unnamed.hello.worker = ""
    misplaced = step_pb2.WorkerFrame(epoch=7, sequence=1)
    misplaced.result.step = 3
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.setsockopt(zmq.LINGER, 0)
        peer.setsockopt(zmq.RCVTIMEO, int(PATIENCE * 1000))
        peer.connect(link)
        peer.send_multipart([b"", b"a", b"request"])
        for frame in (b"", b"\xff" * 1000, unnamed.SerializeToString(), b"\0" * 10_000_000):
            peer.send(frame)
        for epoch in range(100):
            misplaced.epoch = epoch
            peer.send(misplaced.SerializeToString())
        # Frames are read in order: its answer shows that those before it were.
        peer.send(hello.SerializeToString())
        answer = step_pb2.RouterFrame.FromString(peer.recv())
    assert "this router serves another model" in answer.goodbye.reason
    assert "frame on the worker link makes no sense" in apart.log.read_text()


def test_workers_of_other_models_are_refused(link: str, apart: Apart, tmp_path: Path) -> None:
    """One that differs in everything but the name, and one that differs in the weights alone."""
    reasons = {
        make_model_folder(tmp_path / "other", layers=1): "this router serves another model",
        make_model_folder(tmp_path / "tiny", seed=1): "its weights differ",
    }
    with ExitStack() as stack:
        workers = {}
        for model, reason in reasons.items():
            command = [*MILI, "worker", str(model), "--router", link]
            worker = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            stack.callback(worker.kill)
            workers[worker] = reason
        for worker, reason in workers.items():
            _, log = worker.communicate(timeout=PATIENCE)
            assert worker.returncode == 78
            assert "the router refused this worker" in log
            assert reason in log
            assert "Traceback" not in log
