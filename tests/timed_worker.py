"""A real worker process without a model: a step takes as long as it is told to.

    python -m tests.timed_worker ADDRESS FOLDER [--step-seconds 0.008] [--max-rows 512]

The real connection, session, step loop and completion thread; only the runner is made up. Owns when
a step ends. Does not know how a router decides: it asserts `starts`, as every worker does.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mili.hub.folder import interface_sha256, read_model_folder
from mili.internal.v1 import step_pb2 as pb
from mili.worker.connection import Connection
from mili.worker.main import serve, stop_on_signals
from mili.worker.progress import Progress

_BLOCK_SIZE = 16
# Lower-case letters in the alphabet that test tokenizers are made of.
_FIRST_TOKEN, _NUM_TOKENS = 64, 26


class TimedStep(NamedTuple):
    """A step that ends at `ends_at`, in monotonic seconds."""

    value: pb.StepResult
    ends_at: float

    def result(self) -> pb.StepResult:
        time.sleep(max(0.0, self.ends_at - time.monotonic()))
        return self.value


@dataclass
class _Row:
    num_known: int
    num_computed: int | None = None


class TimedRunner:
    """Steps run one after the other, each for `step_seconds`; token i of a row is a letter."""

    def __init__(self, step_seconds: float, max_rows: int, max_model_len: int) -> None:
        self._step_seconds = step_seconds
        self._max_rows = max_rows
        self._max_model_len = max_model_len
        self._rows: dict[int, _Row] = {}
        self._free_at = 0.0

    def ready(self) -> pb.Ready:
        return pb.Ready(
            num_blocks=1 + self._max_rows * -(-self._max_model_len // _BLOCK_SIZE),
            block_size=_BLOCK_SIZE,
            max_rows=self._max_rows,
            max_step_tokens=8192,
            max_model_len=self._max_model_len,
            vocab_size=320,
        )

    def warm_up(self) -> None:
        """There is nothing to warm."""

    def reset(self) -> None:
        self._rows.clear()

    def start(self, command: pb.StepCommand) -> TimedStep:
        for admission in command.admissions:
            self._rows[admission.row] = _Row(len(admission.token_ids) // 4)
        result = pb.StepResult(
            step=command.step, device_microseconds=round(self._step_seconds * 1e6)
        )
        num_new: list[int] = []
        token_ids: list[int] = []
        for row, start, count in zip(command.rows, command.starts, command.num_tokens, strict=True):
            new = self._compute(self._rows[row], start, count)
            num_new.append(new)
            if new:
                token_ids.append(_FIRST_TOKEN + (start + row) % _NUM_TOKENS)
        result.num_new.extend(num_new)
        result.token_ids.extend(token_ids)
        self._free_at = max(self._free_at, time.monotonic()) + self._step_seconds
        return TimedStep(result, self._free_at)

    def _compute(self, row: _Row, start: int, count: int) -> int:
        """Returns how many tokens the row samples: 0 or 1."""
        assert row.num_computed in (None, start), "router and worker have drifted apart"
        row.num_computed = start + count
        samples = row.num_computed == row.num_known
        row.num_known += samples
        return int(samples)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--step-seconds", type=float, default=0.008)
    parser.add_argument("--max-rows", type=int, default=512)
    options = parser.parse_args(arguments)
    folder = read_model_folder(options.folder, weights=False)
    hello = pb.Hello(
        protocol_min=1,
        protocol_max=1,
        worker="timed",
        instance=secrets.token_hex(8),
        world_size=1,
        interface_sha256=interface_sha256(folder),
        weights_sha256=b"w" * 32,
    )
    progress = Progress()
    connection = Connection(options.address, hello, progress)
    stop_on_signals(connection, progress)
    runner = TimedRunner(options.step_seconds, options.max_rows, folder.max_context_tokens)
    try:
        return serve(connection, progress, lambda welcome: runner)
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
