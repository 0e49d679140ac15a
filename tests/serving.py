"""`mili serve` as a real tree of processes, for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
import psutil
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

MILI = [sys.executable, "-P", "-m", "mili.cli.main"]
# Settings for tests that compare tokens. Of two threads each would wait for what else is running.
STEADY = {"MILI_DTYPE": "float32", "MILI_NUM_THREADS": "1"}


class Served:
    """A running `mili serve`. `log` is its stderr; `address`, `admin` and `http` are host:port."""

    def __init__(self, process: subprocess.Popen[str], log: Path, admin_port: int) -> None:
        self.process = process
        self.log = log
        self.admin = f"127.0.0.1:{admin_port}"
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready: "), f"mili serve did not get ready:\n{log.read_text()}"
        words = line.split()
        self.address = words[3].rstrip(",")
        self.http = words[6].rstrip(",") if words[4] == "http" else ""

    def children(self, command: str) -> list[psutil.Process]:
        """The child processes that run `mili COMMAND`, as in "worker"."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if child.cmdline()[-1:] == [command]]

    def stop(self, patience: float = 30.0) -> int:
        """End it as an operator would; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(patience)


@contextmanager
def serving(model: Path | str, log: Path, *flags: str, **environment: str) -> Iterator[Served]:
    """Serve a model on a free port; in the end it must drain and exit 0."""
    admin_port = free_port()
    command = [*MILI, "serve", str(model), "--port", "0", "--admin-port", str(admin_port), *flags]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **environment},
        )
    try:
        served = Served(process, log, admin_port)
        yield served
        if process.poll() is None:
            assert served.stop() == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


class Apart(NamedTuple):
    """A running `mili router` and `mili worker`. `log` is the stderr of both."""

    address: str
    log: Path


@contextmanager
def serving_apart(model: Path, link: str, log: Path) -> Iterator[Apart]:
    """Serve a model with two processes that only `link` ties; in the end both must exit 0."""
    address = f"127.0.0.1:{free_port()}"
    ports = ["--port", address.partition(":")[2], "--admin-port", str(free_port())]
    environment = {**os.environ, **STEADY}
    commands = [
        ["worker", str(model), "--router", link],
        ["router", str(model), "--worker-link", link, *ports],
    ]
    with ExitStack() as stack:
        stderr = stack.enter_context(log.open("w"))
        processes = []
        for command in commands:
            process = subprocess.Popen([*MILI, *command], stderr=stderr, env=environment)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        with grpc.insecure_channel(address, (("grpc.initial_reconnect_backoff_ms", 100),)) as api:
            request = health_pb2.HealthCheckRequest(service="readiness")
            watch = HealthStub(api).Watch(request, wait_for_ready=True, timeout=60)
            while next(watch).status != health_pb2.HealthCheckResponse.SERVING:
                pass
            watch.cancel()
        yield Apart(address, log)
        for process in reversed(processes):
            process.terminate()
            assert process.wait(30) == 0, log.read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll a condition that no event tells of."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)
