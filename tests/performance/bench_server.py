"""`mili serve` and its clients for a benchmark, and the machine that they run on.

Owns the processes. Does not know what is measured.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.performance.load_clients import Clients
from tests.performance.qwen3 import Model
from tests.serving import MILI, Served, free_port

PROCESSES = 4
# Seconds until a server that does not get ready is ended.
START_PATIENCE = 150.0
STOP_PATIENCE = 60.0


class Server(NamedTuple):
    """spawned: monotonic seconds. compiled: kernels that had to be compiled for this start."""

    clients: Clients
    spawned: float
    compiled: int


class Memory(NamedTuple):
    """Of the GPU, in MiB."""

    used: int
    total: int


@contextmanager
def serving(
    model: Model, folder: Path, log: Path, flags: Sequence[str], cache: Path | None
) -> Iterator[Server]:
    """Serve the folder until the block ends. AssertionError, with the log, if it does not start.

    cache: where CuPy keeps compiled code, if not where it always does.
    """
    port, admin_port = free_port(), free_port()
    command = [*MILI, "serve", str(folder), "--port", str(port), "--admin-port", str(admin_port)]
    variables = {"CUPY_CACHE_DIR": str(cache)} if cache else {}
    cached = _count_compiled(cache)
    with Clients(f"127.0.0.1:{port}", PROCESSES, model.vocab_size) as clients, log.open("w") as err:
        spawned = time.monotonic()
        process = subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            env={**os.environ, **variables},
        )
        ready = threading.Event()
        threading.Thread(target=_watch_start, args=(process, log, ready), daemon=True).start()
        try:
            Served(process, log, admin_port)
            ready.set()
            yield Server(clients, spawned, _count_compiled(cache) - cached)
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_PATIENCE)
        finally:
            ready.set()
            # Its children are tied to it, and end with it.
            process.kill()
            process.wait()


def _watch_start(process: subprocess.Popen[str], log: Path, ready: threading.Event) -> None:
    """End a server whose worker dies before it is ready, rather than see it tried for ever."""
    end = time.monotonic() + START_PATIENCE
    while not ready.wait(0.5):
        if time.monotonic() > end or "process died" in log.read_text():
            process.kill()
            return


def _count_compiled(cache: Path | None) -> int:
    """Files in CuPy's cache of compiled code."""
    default = os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")
    folder = cache or Path(default).expanduser()
    return sum(1 for _ in folder.glob("*.cubin")) if folder.is_dir() else 0


def device_memory() -> Memory | None:
    """None without a GPU."""
    answer = _ask(
        "nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"
    )
    return Memory(*map(int, answer.splitlines()[0].split(","))) if answer else None


def environment(benchmark: str) -> dict[str, str]:
    """Date, commit, card and command, for the record."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _ask("git", "describe", "--always", "--dirty") or "unknown",
        "card": _ask("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
        or "no GPU",
        "cores": str(os.cpu_count()),
        "command": shlex.join(["python", "-m", f"tests.performance.{benchmark}", *sys.argv[1:]]),
    }


def _ask(*command: str) -> str:
    """What a program prints; empty where there is none such, or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
