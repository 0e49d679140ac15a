"""A worker process whose steps only take time: `paced_worker.py ADDRESS MODEL SECONDS ROWS`.

The real connection, session and step loop; the runner sleeps until its step is over.
"""

from __future__ import annotations

import secrets
import sys
import time
from pathlib import Path

from mili.hub.folder import interface_sha256, read_model_folder
from mili.internal.v1 import step_pb2 as pb
from mili.worker.completion import DoneStep
from mili.worker.connection import Connection
from mili.worker.main import serve, stop_on_signals
from mili.worker.progress import Progress

TOKEN = 5


class PacedRunner:
    """Takes `seconds` for every step, one after another."""

    def __init__(self, seconds: float, rows: int, max_model_len: int, vocab_size: int) -> None:
        self._seconds = seconds
        self._free_at = 0.0
        self._ready = pb.Ready(
            num_blocks=1 + rows * -(-max_model_len // 16),
            block_size=16,
            max_rows=rows + 1,
            max_step_tokens=2048,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
        )
        self.reset()

    def ready(self) -> pb.Ready:
        return self._ready

    def warm_up(self) -> None:
        """Nothing to warm up."""

    def reset(self) -> None:
        self._known: dict[int, int] = {}

    def start(self, command: pb.StepCommand) -> DoneStep:
        now = time.monotonic()
        self._free_at = max(now, self._free_at) + self._seconds
        for admission in command.admissions:
            self._known[admission.row] = len(admission.token_ids) // 4
        result = pb.StepResult(step=command.step, device_microseconds=round(self._seconds * 1e6))
        for row, start, count in zip(command.rows, command.starts, command.num_tokens, strict=True):
            samples = start + count == self._known[row]
            self._known[row] += samples
            result.num_new.append(int(samples))
            result.token_ids.extend([TOKEN] * samples)
        time.sleep(self._free_at - now)
        return DoneStep(result)


def main(address: str, model: str, seconds: str, rows: str) -> int:
    folder = read_model_folder(Path(model), weights=False)
    hello = pb.Hello(
        protocol_min=1,
        protocol_max=1,
        worker="paced",
        instance=secrets.token_hex(8),
        world_size=1,
        interface_sha256=interface_sha256(folder),
        weights_sha256=b"w" * 32,
    )
    progress = Progress()
    connection = Connection(address, hello, progress)
    stop_on_signals(connection, progress)
    runner = PacedRunner(float(seconds), int(rows), folder.max_context_tokens, folder.vocab_size)
    try:
        return serve(connection, progress, lambda welcome: runner)
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
