"""Serve the built-in model, ask it one question, stop: what `make demo` runs.

    mili pull smollm2-135m
    python examples/demo.py "Explain in two sentences why the sky is blue."

Starts `mili serve` on a free port, lets `mili generate` print the answer, and ends the server as an
operator would, with SIGTERM. Shows the server's log only if something went wrong.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

MODEL = "smollm2-135m"
MILI = [sys.executable, "-P", "-m", "mili.cli.main"]
# Seconds: far more than a slow machine needs, so that nothing hangs for ever.
START_TIMEOUT = 90.0
STOP_TIMEOUT = 45.0
# How much of the log a failure shows.
LOG_LINES = 80


def main() -> int:
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} PROMPT", file=sys.stderr)
        return 2
    with tempfile.TemporaryFile() as log:
        with running_server(log) as (server, address):
            answered = address is not None and ask(address, sys.argv[1])
        if answered and server.returncode == 0:
            return 0
        print(f"The demo failed; mili serve ended with {server.returncode}.", file=sys.stderr)
        log.seek(0)
        sys.stderr.buffer.writelines(log.readlines()[-LOG_LINES:])
        return 1


@contextmanager
def running_server(log: IO[bytes]) -> Iterator[tuple[subprocess.Popen[str], str | None]]:
    """Yield `mili serve` and its address, None if it did not get ready; stop it in the end."""
    command = [*MILI, "serve", MODEL, "--port", "0", "--admin-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server:
        try:
            yield server, wait_ready(server)
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_ready(server: subprocess.Popen[str]) -> str | None:
    """Wait for the line "ready: grpc on HOST:PORT, ..."; return HOST:PORT."""
    assert server.stdout is not None
    # Ending the server also ends the wait for its line.
    alarm = threading.Timer(START_TIMEOUT, server.terminate)
    alarm.start()
    line = server.stdout.readline()
    alarm.cancel()
    return line.split()[3].rstrip(",") if line.startswith("ready: ") else None


def ask(address: str, prompt: str) -> bool:
    """Let `mili generate` stream the answer to the terminal; return whether it did."""
    print(f"> {prompt}\n", flush=True)
    command = [*MILI, "generate", prompt, "--address", address, "--temperature", "0"]
    return subprocess.run([*command, "--max-tokens", "120"]).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
