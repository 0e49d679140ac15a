"""What a worker must be to join: the checks of Hello and Ready.

Owns the reasons for a refusal. Does not know epochs, sockets or time. Every function returns the
objection as a sentence for the worker's log, or None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mili.internal.v1.step_pb2 import Hello, Ready, StartupPhase
from mili.router.worker_peer import WorkerPeer

PROTOCOL = 1
MAX_NAME_LENGTH = 128
MAX_WORLD_SIZE = 64
SHA256_LENGTH = 32
MAX_STARTUP_PHASES = 64
MAX_STARTUP_SECONDS = 1e6

OTHER_WEIGHTS = (
    "its weights differ from those that this router's workers served so far: "
    "give every worker the same files, or restart the router to change the weights"
)


def malformed(hello: Hello) -> bool:
    """Whether this cannot come from a worker of ours, of whatever version."""
    names = (hello.worker, hello.instance, hello.group or hello.worker)
    return (
        not all(0 < len(name) <= MAX_NAME_LENGTH and name.isprintable() for name in names)
        or not 1 <= hello.world_size <= MAX_WORLD_SIZE
        or hello.rank >= hello.world_size
        or len(hello.interface_sha256) != SHA256_LENGTH
        or len(hello.weights_sha256) != SHA256_LENGTH
    )


def object_to_model(
    hello: Hello, interface_sha256: bytes, weights_sha256: bytes | None
) -> str | None:
    """Check protocol and model. weights_sha256: of the workers that serve, if any ever did."""
    if not hello.protocol_min <= PROTOCOL <= hello.protocol_max:
        return (
            f"this router speaks protocol {PROTOCOL}, the worker "
            f"{hello.protocol_min} to {hello.protocol_max}: install the same version of mili"
        )
    if hello.interface_sha256 != interface_sha256:
        return (
            "this router serves another model: config, tokenizer, chat template and generation "
            "config must be the same files on router and worker"
        )
    if weights_sha256 not in (None, hello.weights_sha256):
        return OTHER_WEIGHTS
    return None


def object_to_place(hello: Hello, ranks: Iterable[WorkerPeer]) -> str | None:
    """Check a worker's place in its group against the other ranks that are alive."""
    for peer in ranks:
        if not peer.epoch or peer.name == hello.worker:
            continue
        if peer.world_size != hello.world_size:
            return f"its group has {peer.world_size} ranks, not {hello.world_size}"
        if peer.rank == hello.rank:
            return f"rank {peer.rank} of its group is already worker {peer.name}"
    return None


def object_to_ready(ready: Ready, ranks: Iterable[WorkerPeer]) -> str | None:
    """Check what a worker says it can do, alone and against the other ranks of its group."""
    numbers = {
        "num_blocks": ready.num_blocks - 1,  # block 0 is the null block
        "block_size": ready.block_size,
        "max_rows": ready.max_rows - 1,  # row 0 is the null row
        "max_step_tokens": ready.max_step_tokens,
        "max_model_len": ready.max_model_len,
        "vocab_size": ready.vocab_size,
    }
    for name, number in numbers.items():
        if number < 1:
            return f"its Ready has no room: {name} is {getattr(ready, name)}"
    if problem := _object_to_startup(ready.startup):
        return problem
    for peer in ranks:
        if peer.ready is not None and (peer.ready.block_size, peer.ready.vocab_size) != (
            ready.block_size,
            ready.vocab_size,
        ):
            return f"its block size or vocabulary differs from rank {peer.rank}'s"
    return None


def _object_to_startup(phases: Sequence[StartupPhase]) -> str | None:
    if len(phases) > MAX_STARTUP_PHASES:
        return f"its Ready has {len(phases)} start-up phases"
    for phase in phases:
        if len(phase.name) > MAX_NAME_LENGTH:
            return "its Ready has a start-up phase whose name is too long"
        if not 0 <= phase.seconds < MAX_STARTUP_SECONDS:  # neither is NaN
            return f"its Ready has a start-up phase of {phase.seconds} seconds"
    return None
