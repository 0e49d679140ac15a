"""What the API itself takes: a token's way from the engine to its caller, and other streams' peace.

    python -m tests.performance.bench_api

A process serves a fake engine that has its one token at once, and this one calls it. Added is what
a caller waits beyond the engine's own time, which is none here. Late is by how much the server's
loop, which every stream waits for, wakes after the time that it asked for, while somebody has 1 MB
of text tokenized: into words, and, which no real vocabulary does to a text, into a token a byte.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mili.hub.folder import ModelFolder
from mili.router.main import prefer_the_loop
from mili.router.params import GenerationParams
from mili.v1 import inference_pb2 as pb
from mili.v1 import model_pb2
from mili.v1.inference_pb2_grpc import InferenceServiceStub
from tests.fake_engine import VOCAB_SIZE, FakeEngine, make_folder, running_api
from tests.performance.bench_server import environment
from tests.virtual_cluster import percentile

CALLS, TEXTS = 2000, 10
# Milliseconds.
ALLOWED_ADDED, ALLOWED_LATE = 1.5, 10.0
TICK_SECONDS = 0.001
TEXT = "The quick brown fox jumps over the lazy dög - 12 times. ".encode() * 20_000
TEXT = TEXT[: 2**20]
LIMIT = (("grpc.max_receive_message_length", -1),)


class PromptEngine(FakeEngine):
    """Has every request's token as soon as it was asked."""

    def submit(self, request_id: str, params: GenerationParams) -> None:
        super().submit(request_id, params)
        asyncio.get_running_loop().call_soon(self.step)


class Loop:
    """How late the running loop wakes, in milliseconds."""

    def __init__(self) -> None:
        self.late: list[float] = []

    async def watch(self) -> None:
        while True:
            due = time.perf_counter() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            self.late.append((time.perf_counter() - due) * 1e3)


def serve(pipe: Connection, path: Path, *, words: bool) -> None:
    """Tell the port; then, whenever asked, how late the loop was since the last time."""
    folder = make_folder(path)
    if words:
        learn_words(folder.tokenizer_path)
    asyncio.run(_serve(pipe, folder))


def learn_words(path: Path) -> None:
    """Replace a tokenizer of bytes by one that knows the words of TEXT."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT[:4096].decode()], trainer)
    backend.save(str(path))


async def _serve(pipe: Connection, folder: ModelFolder) -> None:
    prefer_the_loop()
    loop = Loop()
    async with running_api(folder, engine=PromptEngine()) as (server, _):
        watch = asyncio.create_task(loop.watch())
        pipe.send(server.public_port)
        with suppress(EOFError):
            while True:
                await asyncio.to_thread(pipe.recv)
                pipe.send(loop.late)
                loop.late = []
        watch.cancel()


def added(channel: grpc.Channel) -> list[float]:
    """Milliseconds of streams of one token, one after the other."""
    stub = InferenceServiceStub(channel)
    stopping = pb.StopConditions(max_tokens=1)
    prompt = pb.TokenIds(ids=range(16))
    request = pb.GenerateStreamRequest(
        generation=pb.Generation(token_ids=prompt, stopping=stopping)
    )
    taken = []
    for _ in range(CALLS):
        started = time.perf_counter()
        events = list(stub.GenerateStream(request))
        taken.append((time.perf_counter() - started) * 1e3)
        assert events[-1].event.finished.usage.completion_tokens == 1
    return taken[CALLS // 10 :]


def tokenize(channel: grpc.Channel, *, offsets: bool) -> None:
    request = model_pb2.TokenizeRequest(texts=[TEXT.decode(errors="ignore")])
    request.return_offsets = offsets
    call = channel.unary_unary("/mili.v1.TokenizerService/Tokenize")
    for _ in range(TEXTS):
        assert len(call(request.SerializeToString())) > len(TEXT) // 8


def told(what: str, values: Iterable[float], allowed: float | None, percent: float) -> bool:
    """Print a line; whether the percentile is allowed."""
    values = list(values)
    reached = percentile(values, percent)
    print(
        f"| {what} | {percentile(values, 50):.2f} | {percentile(values, 99):.2f} |"
        f" {max(values):.2f} |"
    )
    return allowed is None or reached <= allowed


@contextmanager
def serving(*, words: bool) -> Iterator[tuple[grpc.Channel, Callable[[], list[float]]]]:
    """A server; the channel to it, and what tells how late its loop was since the last time."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()

    def late() -> list[float]:
        ours.send(None)
        seen: list[float] = ours.recv()
        return seen

    with tempfile.TemporaryDirectory() as folder:
        arguments = {"pipe": theirs, "path": Path(folder), "words": words}
        process = context.Process(target=serve, kwargs=arguments)
        process.start()
        theirs.close()
        try:
            with grpc.insecure_channel(f"127.0.0.1:{ours.recv()}", LIMIT) as channel:
                yield channel, late
        finally:
            ours.close()
            process.join()


def main() -> int:
    print(environment("bench_api"))
    print("| milliseconds | median | p99 | most |\n|---|--:|--:|--:|")
    with serving(words=True) as (channel, late):
        good = told("a stream of one token", added(channel), ALLOWED_ADDED, 50)
        late()
        time.sleep(2)
        told("late, nothing runs", late(), None, 100)
        for offsets in (False, True):
            tokenize(channel, offsets=offsets)
            what = "late, Tokenize of 1 MB" + ", with offsets" * offsets
            good &= told(what, late(), ALLOWED_LATE, 100)
    with serving(words=False) as (channel, late):
        late()
        tokenize(channel, offsets=True)
        good &= told(
            "late, Tokenize of 1 MB, with offsets, a token a byte", late(), ALLOWED_LATE, 100
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
