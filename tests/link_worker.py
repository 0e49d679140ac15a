"""A real worker process whose runner only answers: `python link_worker.py ADDRESS [NAME [KEYS]]`.

The real signals, the real connection, the real step loop. Step 13 fails; a worker named "slow"
does not get through loading.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mili.internal.v1 import step_pb2 as pb
from mili.worker.completion import DoneStep
from mili.worker.connection import Connection
from mili.worker.main import serve, stop_on_signals
from mili.worker.progress import Progress
from mili.worker.worker_keys import read_worker_keys

HELLO = pb.Hello(
    protocol_min=1,
    protocol_max=1,
    world_size=1,
    interface_sha256=b"i" * 32,
    weights_sha256=b"w" * 32,
)
READY = pb.Ready(
    num_blocks=100,
    block_size=16,
    max_rows=512,
    max_step_tokens=512,
    max_model_len=512,
    vocab_size=1000,
)


class EchoRunner:
    """Answers each row with its start; insists on steps 1, 2, 3, ... after every reset."""

    def __init__(self) -> None:
        self._steps = 0

    def ready(self) -> pb.Ready:
        return READY

    def warm_up(self) -> None:
        self._steps = -1

    def reset(self) -> None:
        self._steps = 0

    def prepare(self, prepare: pb.Prepare, reply: Callable[[pb.Prepared], None]) -> None:
        reply(pb.Prepared(id=prepare.id, error="" if prepare.id != 13 else "no luck"))

    def start(self, command: pb.StepCommand) -> DoneStep:
        self._steps += 1
        assert command.step == self._steps, (command.step, self._steps)
        if command.step == 13:
            raise KeyError("no luck")
        num_new = [1] * len(command.rows)
        result = pb.StepResult(step=command.step, num_new=num_new, token_ids=command.starts)
        return DoneStep(result)


def main(address: str, name: str = "w", keys: str = "") -> int:
    hello = pb.Hello(worker=name, instance=secrets.token_hex(8))
    hello.MergeFrom(HELLO)
    progress = Progress()
    connection = Connection(
        address, hello, progress, keys=read_worker_keys(Path(keys)) if keys else None
    )
    stop_on_signals(connection, progress)

    def load(welcome: pb.Welcome) -> EchoRunner:
        print("loading", flush=True)
        if name == "slow":
            time.sleep(60)
        return EchoRunner()

    try:
        return serve(connection, progress, load)
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
