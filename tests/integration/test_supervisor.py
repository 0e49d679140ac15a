"""The supervisor of `mili serve` with real processes, real signals and a real terminal.

The supervisor runs in a process of its own; its children are small scripts that write what happens
to them into a FIFO, which the test reads.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest

SUPERVISOR = """
import asyncio, fcntl, json, os, sys, termios
from mili.cli.logging import set_up_logging
from mili.cli.supervisor import Child, Patience, Supervisor

children, patience, terminal = json.loads(sys.argv[1])
if terminal:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
set_up_logging("serve", "info", "json")

async def main():
    router, *others = [
        Child(name, [sys.executable, "-c", code], {**os.environ, "CHILD": name})
        for name, code in children.items()
    ]
    fronts = [child for child in others if child.name == "http"]
    workers = [child for child in others if child not in fronts]
    return await Supervisor(router, workers, Patience(**patience), fronts).run()

sys.exit(asyncio.run(main()))
"""

CHILD = """
import os, signal, sys, threading, time
from mili.cli.lifeline import tie_to_parent

tie_to_parent()
events = os.open(os.environ["EVENTS"], os.O_WRONLY)

def note(event):
    os.write(events, f"{os.environ['CHILD']} {event} {os.getpid()}\\n".encode())

def end(number, frame):
    note("SIGTERM")
    time.sleep(0.2)
    note("ended")
    sys.exit(0)

signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, lambda number, frame: note("SIGINT"))
note("started")
"""
OBEDIENT = CHILD + "while True: signal.pause()"
STUBBORN = CHILD.replace("    time.sleep(0.2)", "    return") + "while True: signal.pause()"


def exits_with(code: int) -> str:
    return CHILD + f"sys.exit({code})"


class Serve:
    """A supervisor under test and what its children said."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log"
        fifo = folder / "events"
        os.mkfifo(fifo)
        self.go = folder / "go"
        self._environment = {**os.environ, "EVENTS": str(fifo), "GO": str(self.go)}
        # Open for both, so that the end of the last writer is not the end of the file.
        self._events = os.open(fifo, os.O_RDWR)
        self._unread = b""
        self._pids: set[int] = set()
        self.process: subprocess.Popen[bytes]

    def start(
        self, children: dict[str, str], *, terminal: int | None = None, **patience: float
    ) -> Serve:
        arguments = json.dumps([children, patience, terminal is not None])
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SUPERVISOR, arguments],
                env=self._environment,
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stderr=log,
                start_new_session=True,
            )
        return self

    def next_event(self, timeout: float = 10.0) -> tuple[str, str, int]:
        """Return (child, event, pid)."""
        while b"\n" not in self._unread:
            readable, _, _ = select.select([self._events], [], [], timeout)
            assert readable, f"no event in {timeout} s; log: {self.log()}"
            self._unread += os.read(self._events, 65536)
        line, _, self._unread = self._unread.partition(b"\n")
        child, event, pid = line.decode().split()
        self._pids.add(int(pid))
        return child, event, int(pid)

    def wait_started(self, *names: str) -> dict[str, int]:
        """Return the pids, when each child has started once more."""
        pids: dict[str, int] = {}
        while pids.keys() != set(names):
            child, event, pid = self.next_event()
            assert (child in names, event) == (True, "started")
            pids[child] = pid
        return pids

    def rest_of_events(self) -> list[tuple[str, str]]:
        """Return what was said until the supervisor, which has ended, was gone."""
        events = []
        while self._unread or select.select([self._events], [], [], 0)[0]:
            events.append(self.next_event()[:2])
        return events

    def log(self) -> str:
        return self._log.read_text()

    def logged(self, event: str) -> list[dict[str, object]]:
        lines = (json.loads(line) for line in self.log().splitlines())
        return [line for line in lines if line["event"] == event]

    def close(self) -> None:
        """Leave nothing running, also where the supervisor under test would."""
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        os.close(self._events)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    serve = Serve(tmp_path)
    yield serve
    serve.close()


def wait_gone(pid: int, timeout: float = 5.0) -> None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([process], [], [], timeout)[0], f"process {pid} lives on"
    finally:
        os.close(process)


def test_a_dead_child_is_restarted_with_growing_delays(serve: Serve) -> None:
    children = {"router": OBEDIENT, "worker-0": exits_with(1)}
    serve.start(children, first_delay=0.05, longest_delay=0.2)
    starts = 0
    while starts < 5:
        starts += serve.next_event()[0] == "worker-0"
    serve.process.terminate()
    assert serve.process.wait(10) == 0
    deaths = serve.logged("process died")
    assert [death["restart_in_seconds"] for death in deaths[:4]] == [0.05, 0.1, 0.2, 0.2]
    assert {(death["child"], death["exit_code"]) for death in deaths} == {("worker-0", 1)}
    times = [datetime.fromisoformat(str(death["timestamp"])) for death in deaths[:4]]
    waits = [(later - sooner).total_seconds() for sooner, later in pairwise(times)]
    assert all(wait >= delay for wait, delay in zip(waits, [0.05, 0.1, 0.2], strict=True))


def test_the_delay_starts_small_again_after_a_healthy_time(serve: Serve) -> None:
    children = {"router": OBEDIENT, "worker-0": exits_with(1)}
    serve.start(children, first_delay=0.05, healthy_after=0.0)
    starts = 0
    while starts < 4:
        starts += serve.next_event()[0] == "worker-0"
    serve.process.terminate()
    assert serve.process.wait(10) == 0
    assert {death["restart_in_seconds"] for death in serve.logged("process died")} == {0.05}


def test_a_killed_child_is_reported_by_signal_and_restarted(serve: Serve) -> None:
    serve.start({"router": OBEDIENT, "worker-0": OBEDIENT}, first_delay=0.01)
    pids = serve.wait_started("router", "worker-0")
    os.kill(pids["router"], signal.SIGKILL)
    assert serve.wait_started("router")["router"] != pids["router"]
    (death,) = serve.logged("process died")
    assert (death["child"], death["signal"]) == ("router", "SIGKILL")


def test_a_refused_worker_is_not_restarted_and_the_others_go_on(serve: Serve) -> None:
    refused = {"worker-0": exits_with(78), "worker-1": OBEDIENT}
    serve.start({"router": OBEDIENT, **refused}, first_delay=0.01)
    pids = serve.wait_started("router", "worker-0", "worker-1")
    # The next start must be that of worker-1: worker-0 has had its only one.
    os.kill(pids["worker-1"], signal.SIGKILL)
    serve.wait_started("worker-1")
    (end,) = serve.logged("process ended for good")
    assert (end["child"], end["exit_code"]) == ("worker-0", 78)
    serve.process.terminate()
    assert serve.process.wait(10) == 0


def test_serve_ends_when_every_worker_was_refused(serve: Serve) -> None:
    workers = {"worker-0": exits_with(78), "worker-1": exits_with(78)}
    serve.start({"router": OBEDIENT, **workers})
    assert serve.process.wait(10) == 78
    events = serve.rest_of_events()
    assert [event for event in events if event[0] != "router"].count(("worker-0", "started")) == 1


def test_serve_ends_when_the_router_cannot_be_configured(serve: Serve) -> None:
    """For instance because its port is in use: no loop of restarts."""
    router = CHILD + "while not os.path.exists(os.environ['GO']): time.sleep(0.01)\n"
    serve.start({"router": router + "sys.exit(2)", "worker-0": OBEDIENT})
    pids = serve.wait_started("router", "worker-0")
    serve.go.touch()
    assert serve.process.wait(10) == 2
    assert serve.rest_of_events() == [("worker-0", "SIGTERM"), ("worker-0", "ended")]
    wait_gone(pids["worker-0"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_drain_ends_the_router_before_the_workers(serve: Serve, number: signal.Signals) -> None:
    serve.start({"router": OBEDIENT, "worker-0": OBEDIENT})
    serve.wait_started("router", "worker-0")
    serve.process.send_signal(number)
    assert serve.process.wait(10) == 0
    assert serve.rest_of_events() == [
        ("router", "SIGTERM"),
        ("router", "ended"),
        ("worker-0", "SIGTERM"),
        ("worker-0", "ended"),
    ]


def test_a_front_is_restarted_and_drains_beside_the_router(serve: Serve) -> None:
    serve.start({"router": OBEDIENT, "http": OBEDIENT, "worker-0": OBEDIENT}, first_delay=0.01)
    pids = serve.wait_started("router", "http", "worker-0")
    os.kill(pids["http"], signal.SIGKILL)
    serve.wait_started("http")
    serve.process.terminate()
    assert serve.process.wait(10) == 0
    events = serve.rest_of_events()
    assert sorted(events[:2]) == [("http", "SIGTERM"), ("router", "SIGTERM")]
    assert sorted(events[2:4]) == [("http", "ended"), ("router", "ended")]
    assert events[4:] == [("worker-0", "SIGTERM"), ("worker-0", "ended")]


def test_serve_ends_when_its_front_cannot_be_configured(serve: Serve) -> None:
    serve.start({"router": OBEDIENT, "http": exits_with(2), "worker-0": OBEDIENT})
    assert serve.process.wait(10) == 2


def test_a_child_that_does_not_end_is_killed_and_the_exit_code_tells(serve: Serve) -> None:
    serve.start({"router": OBEDIENT, "worker-0": STUBBORN}, grace=0.5)
    pids = serve.wait_started("router", "worker-0")
    serve.process.terminate()
    assert serve.process.wait(10) == 1
    (kill,) = serve.logged("process did not end in time: killing it")
    assert kill["child"] == "worker-0"
    wait_gone(pids["worker-0"])


def test_the_second_signal_kills_at_once(serve: Serve) -> None:
    serve.start({"router": STUBBORN, "worker-0": OBEDIENT}, drain=60.0)
    pids = serve.wait_started("router", "worker-0")
    serve.process.send_signal(signal.SIGINT)
    assert serve.next_event()[:2] == ("router", "SIGTERM")
    started = time.monotonic()
    serve.process.send_signal(signal.SIGINT)
    assert serve.process.wait(10) == 1
    assert time.monotonic() - started < 5
    for pid in pids.values():
        wait_gone(pid)


def test_no_orphan_is_left_when_the_supervisor_is_killed(serve: Serve) -> None:
    serve.start({"router": STUBBORN, "worker-0": STUBBORN, "worker-1": STUBBORN})
    pids = serve.wait_started("router", "worker-0", "worker-1")
    serve.process.kill()
    for pid in pids.values():
        wait_gone(pid)


def test_a_child_whose_parent_is_already_gone_ends_itself() -> None:
    child = subprocess.run(
        [sys.executable, "-c", "from mili.cli.lifeline import tie_to_parent; tie_to_parent()"],
        env={**os.environ, "MILI_PARENT_PID": "1"},
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert child.returncode == 1
    assert "parent process 1 is gone" in child.stderr


def test_ctrl_c_in_a_terminal_reaches_the_supervisor_alone(serve: Serve) -> None:
    master, slave = pty.openpty()
    serve.start({"router": OBEDIENT, "worker-0": OBEDIENT}, terminal=slave)
    os.close(slave)
    serve.wait_started("router", "worker-0")
    os.write(master, b"\x03")
    assert serve.process.wait(10) == 0
    os.close(master)
    assert [event for _, event in serve.rest_of_events()] == ["SIGTERM", "ended"] * 2
    (drain,) = serve.logged("draining; once more kills at once")
    assert drain["signal"] == "SIGINT"


def test_a_child_that_cannot_be_started_ends_everything() -> None:
    """A bug of ours, or no memory left: never a supervisor that hangs."""
    broken = SUPERVISOR.replace('[sys.executable, "-c", code]', "[code]")
    children = json.dumps([{"router": "/no/such/program", "worker-0": "/none"}, {}, False])
    ended = subprocess.run(
        [sys.executable, "-c", broken, children], capture_output=True, timeout=10
    )
    assert ended.returncode == 1
