"""What the router costs: CPU per streamed token, gaps between messages, and the scheduler alone.

    python -m tests.performance.bench_router [--streams 256] [--seconds 10]
        [--only served,scheduler]

A worker process without a model ends a step every 8 ms; real clients stream text and token ids
through real gRPC on loopback. CPU is the router process's own (user and system, all its threads),
from before the first request to after the last: starts and ends are in it. Gaps are what a client
sees, so they hold the client's own delay and that of a busy machine.

Owns what is run and what is asked of it. Does not know how the router does it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count, pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import grpc
import psutil
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from rich.console import Console
from rich.table import Table

from mili.internal.v1.step_pb2 import Sampling, StepCommand, StepResult
from mili.router.limits import Limits
from mili.router.params import GenerationParams
from mili.router.request import Request
from mili.router.scheduler import Scheduler
from tests.fake_engine import VOCAB_SIZE, make_folder
from tests.performance.bench_server import environment
from tests.performance.load_clients import Clients, Prompt, Stream, time_to
from tests.serving import MILI, free_port

TIMED_WORKER = [sys.executable, "-m", "tests.timed_worker"]
STEP_SECONDS = 0.008
CONTEXT_LIMIT = 4096
PROMPT_TOKENS = 24
CLIENT_PROCESSES = 2
LATE_ARRIVALS = 40
# Steps of the scheduler that are timed, after some that are not.
TIMED_STEPS, UNTIMED_STEPS = 500, 50

# What is asked for, in the units of the table.
MOST_CPU, LONGEST_GAP, LONGEST_SCHEDULING = 15.0, 50.0, 0.6


_T = TypeVar("_T")


class Served(NamedTuple):
    """A router with one worker, its clients, and one client apart from them."""

    router: psutil.Process
    crowd: Clients
    single: Clients

    def cpu_seconds(self) -> float:
        """What the router has used since it began."""
        used = self.router.cpu_times()
        return float(used.user + used.system)

    def others(self) -> float:
        """CPU seconds that processes not of this benchmark have used: they slow down ours."""
        total = psutil.cpu_times()
        this = psutil.Process()
        family = [each.cpu_times() for each in (this, *this.children(recursive=True))]
        ours = sum(each.user + each.system for each in family)
        return float(total.user + total.nice + total.system - ours)


class Line(NamedTuple):
    """limit: what may not be passed, if anything is asked."""

    what: str
    value: float
    unit: str
    limit: float | None = None


@contextmanager
def served(folder: Path, rows: int) -> Iterator[Served]:
    """A router, and a worker with so many rows, until the block ends."""
    make_folder(folder, context_limit=CONTEXT_LIMIT)
    link = f"ipc://{folder}/link/workers"
    address = f"127.0.0.1:{free_port()}"
    ports = ["--port", address.partition(":")[2], "--admin-port", str(free_port())]
    commands = [
        [*MILI, "router", str(folder), "--worker-link", link, "--log-level", "error", *ports],
        [
            sys.executable,
            "-m",
            "tests.timed_worker",
            link,
            str(folder),
            "--max-rows",
            str(rows + 8),
        ],
    ]
    with (
        ExitStack() as stack,
        Clients(address, CLIENT_PROCESSES, VOCAB_SIZE, text=True) as crowd,
        Clients(address, 1, VOCAB_SIZE, text=True) as single,
    ):
        processes = []
        for command in commands:
            process = subprocess.Popen(command)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            processes.append(process)
        _wait_until_serving(address)
        yield Served(psutil.Process(processes[0].pid), crowd, single)


def _wait_until_serving(address: str) -> None:
    with grpc.insecure_channel(address, (("grpc.initial_reconnect_backoff_ms", 100),)) as api:
        request = health_pb2.HealthCheckRequest(service="readiness")
        watch = HealthStub(api).Watch(request, wait_for_ready=True, timeout=60)
        while next(watch).status != health_pb2.HealthCheckResponse.SERVING:
            pass
        watch.cancel()


class Bench:
    """The served router: each method is a run, and adds lines to the table."""

    def __init__(self, server: Served, streams: int) -> None:
        self.lines: list[Line] = []
        self._server = server
        self._streams = streams
        self._seeds = count()

    def measure_starts(self) -> None:
        """Requests of one token: what a request costs beside its tokens."""
        self._crowd(1)
        used, *_ = self._timed(1)
        self.lines.append(Line("CPU per request", 1e3 * used / self._streams, "ms"))

    def measure_streaming(self, tokens: int) -> None:
        used, others, streams = self._timed(tokens)
        total = sum(sum(stream.counts) for stream in streams)
        messages = sum(len(stream.counts) for stream in streams)
        gaps = sorted(gap for stream in streams for gap in _gaps(stream))
        seconds = max(each.times[-1] for each in streams) - min(each.began for each in streams)
        self.lines += [
            Line("tokens streamed", total, "tokens"),
            Line("rate", total / seconds, "tokens/s"),
            Line("tokens in a message", total / messages, "tokens"),
            Line("CPU per streamed token", 1e6 * used / total, "us", MOST_CPU),
            Line("CPU per message", 1e6 * used / messages, "us"),
            Line("CPU of the router", 100 * used / seconds, "% of a core"),
            Line("CPU of processes beside all this", 100 * others / seconds, "% of a core"),
            Line("gap between messages, median", 1e3 * statistics.median(gaps), "ms"),
            Line("gap between messages, p99", 1e3 * gaps[len(gaps) * 99 // 100], "ms", LONGEST_GAP),
            Line("gap between messages, longest", 1e3 * gaps[-1], "ms"),
        ]

    def measure_arrivals(self, tokens: int) -> None:
        """Requests that come one by one: first alone, then beside the crowd."""
        self._add_first_tokens("alone")
        with ThreadPoolExecutor(1) as thread:
            crowd = thread.submit(self._crowd, tokens)
            time.sleep(2.0)
            self._add_first_tokens(f"beside {self._streams} streams")
            assert not crowd.done(), "the crowd had gone"
            crowd.result()

    def _add_first_tokens(self, where: str) -> None:
        waits = []
        for _ in range(LATE_ARRIVALS):
            (stream,) = self._server.single.run(self._prompts(1), 2)
            waits.append(1e3 * time_to(stream, 1))
        self.lines += [
            Line(f"first token {where}, median", statistics.median(waits), "ms"),
            Line(f"first token {where}, longest", max(waits), "ms"),
        ]

    def _timed(self, tokens: int) -> tuple[float, float, list[Stream]]:
        """CPU seconds of the router and of strangers, and what the clients saw."""
        before, others = self._server.cpu_seconds(), self._server.others()
        streams = self._crowd(tokens)
        return self._server.cpu_seconds() - before, self._server.others() - others, streams

    def _crowd(self, tokens: int) -> list[Stream]:
        return self._server.crowd.run(self._prompts(self._streams), tokens)

    def _prompts(self, number: int) -> list[Prompt]:
        return [Prompt(next(self._seeds), PROMPT_TOKENS) for _ in range(number)]


def _gaps(stream: Stream) -> list[float]:
    return [after - before for before, after in pairwise(stream.times)]


def measure_scheduler(rows: int) -> list[Line]:
    """A step of decoding rows in Python alone: no socket, no text."""
    limits = Limits(
        num_blocks=1 + rows * CONTEXT_LIMIT // 16,
        block_size=16,
        max_rows=rows + 1,
        max_step_tokens=8192,
        max_model_len=CONTEXT_LIMIT,
        vocab_size=VOCAB_SIZE,
        capabilities=frozenset(),
    )
    scheduler = Scheduler(limits)
    for number in range(rows):
        prompt = [number % VOCAB_SIZE] * PROMPT_TOKENS
        params = GenerationParams(prompt, Sampling(seed=number), max_tokens=CONTEXT_LIMIT)
        scheduler.add(Request(str(number), params, context_limit=CONTEXT_LIMIT))
    schedule_times: list[float] = []
    update_times: list[float] = []
    for _ in range(UNTIMED_STEPS + TIMED_STEPS):
        command = _timed_call(schedule_times, scheduler.schedule)
        assert command is not None
        result = _answer(command)
        _timed_call(update_times, lambda result=result: scheduler.update(result))
    both = [1e3 * (a + b) for a, b in zip(schedule_times, update_times, strict=True)]
    both = sorted(both[UNTIMED_STEPS:])
    what = f"schedule + update, {rows} rows"
    return [
        Line("schedule, median", 1e3 * statistics.median(schedule_times[UNTIMED_STEPS:]), "ms"),
        Line("update, median", 1e3 * statistics.median(update_times[UNTIMED_STEPS:]), "ms"),
        Line(f"{what}, median", statistics.median(both), "ms", LONGEST_SCHEDULING),
        Line(f"{what}, p99", both[len(both) * 99 // 100], "ms"),
    ]


def _timed_call(times: list[float], call: Callable[[], _T]) -> _T:
    began = time.perf_counter()
    value = call()
    times.append(time.perf_counter() - began)
    return value


def _answer(command: StepCommand) -> StepResult:
    rows = len(command.rows)
    return StepResult(step=command.step, num_new=[1] * rows, token_ids=[5] * rows)


def print_lines(title: str, lines: Sequence[Line]) -> bool:
    """Returns whether every limit holds."""
    table = Table("what", "value", "", "asked", "met", title=title)
    for line in lines:
        asked = "" if line.limit is None else f"<= {line.limit:g}"
        met = "" if line.limit is None else "yes" if line.value <= line.limit else "NO"
        table.add_row(line.what, f"{line.value:,.2f}", line.unit, asked, met)
    Console(width=110).print(table)
    return all(line.limit is None or line.value <= line.limit for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--only", default="served,scheduler")
    arguments = parser.parse_args()
    tokens = min(round(arguments.seconds / STEP_SECONDS), CONTEXT_LIMIT - PROMPT_TOKENS)
    kept = True
    if "served" in arguments.only:
        with (
            tempfile.TemporaryDirectory() as name,
            served(Path(name) / "demo", arguments.streams) as server,
        ):
            bench = Bench(server, arguments.streams)
            bench.measure_starts()
            bench.measure_streaming(tokens)
            bench.measure_arrivals(tokens)
        title = f"{arguments.streams} streams, a step every {1e3 * STEP_SECONDS:g} ms"
        kept &= print_lines(title, bench.lines)
    if "scheduler" in arguments.only:
        kept &= print_lines("scheduler alone", measure_scheduler(arguments.streams))
    machine = environment("bench_router")
    print(f"{machine['date']}, commit {machine['commit']}, {os.cpu_count()} cores")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
