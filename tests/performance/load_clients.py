"""Client processes that stream generations: their half, and how the benchmark drives them.

    python -m tests.performance.load_clients HOST:PORT

A client reads a job in JSON from a line of stdin, prepares its requests, answers "prepared", waits
for a line that says go, starts all streams at once, and answers what came when. Token ids go in
and out; text comes too where it is asked for. Owns what a stream must look like. Does not know what
is measured.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Self

import grpc

from mili.client.channel import channel_options
from mili.client.requests import build_generation
from mili.v1 import inference_pb2 as pb
from mili.v1.inference_pb2_grpc import InferenceServiceStub

# Seconds. Nothing that is measured takes so long: what does has failed.
PATIENCE = 120.0


class Prompt(NamedTuple):
    """Random token ids, the same wherever they are drawn. json_schema: that the output must fit."""

    seed: int
    length: int
    json_schema: str = ""

    def token_ids(self, vocab_size: int) -> list[int]:
        return random.Random(self.seed).choices(range(vocab_size), k=self.length)


class Stream(NamedTuple):
    """What one stream got. Times are of the machine's monotonic clock, in seconds."""

    began: float
    times: list[float]  # when each message with tokens came
    counts: list[int]  # how many it had
    token_ids: list[int]
    cached: int  # prompt tokens from the prefix cache


def duration(streams: Sequence[Stream]) -> float:
    """From the first start to the last token, in seconds."""
    return max(stream.times[-1] for stream in streams) - min(stream.began for stream in streams)


def time_to(stream: Stream, count: int) -> float:
    """Seconds until the stream had `count` tokens."""
    totals = zip(itertools.accumulate(stream.counts), stream.times, strict=True)
    return next(at for total, at in totals if total >= count) - stream.began


def median_gap(streams: Sequence[Stream]) -> float:
    """Median seconds per token while all decode; tokens of one message share its gap."""
    begin = max(stream.times[0] for stream in streams)
    end = min(stream.times[-1] for stream in streams)
    gaps = [
        (at - before) / count
        for stream in streams
        for (before, at), count in zip(
            itertools.pairwise(stream.times), stream.counts[1:], strict=True
        )
        if begin <= before and at <= end
        for _ in range(count)
    ]
    return statistics.median(gaps) if gaps else math.nan


class ClientsError(Exception):
    """A client process ended; its stderr says why."""


class Clients:
    """Client processes of one server. They start before it does, and connect when it is needed."""

    def __init__(
        self, address: str, processes: int, vocab_size: int, *, text: bool = False
    ) -> None:
        self._vocab_size = vocab_size
        self._text = text
        command = [sys.executable, "-m", "tests.performance.load_clients", address]
        self._stack = ExitStack()
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(processes)
        ]
        for process in self._processes:
            self._stack.enter_context(process)
            self._stack.callback(process.kill)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Stream]:
        """Stream all prompts at once, shared out evenly; in their order. Raises ClientsError."""
        used = self._processes[: len(prompts)]
        for index, process in enumerate(used):
            job = {
                "prompts": prompts[index :: len(used)],
                "max_tokens": max_tokens,
                "vocab_size": self._vocab_size,
                "text": self._text,
            }
            _tell(process, json.dumps(job))
        for process in used:
            _hear(process)
        for process in used:
            _tell(process, "go")
        answers = [[Stream(*stream) for stream in json.loads(_hear(each))] for each in used]
        return [answers[i % len(used)][i // len(used)] for i in range(len(prompts))]


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    try:
        print(line, file=process.stdin, flush=True)
    except BrokenPipeError:
        raise ClientsError("a client process is gone") from None


def _hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise ClientsError("a client process ended; its error stands above")
    return line


async def _serve_jobs(address: str) -> None:
    async with grpc.aio.insecure_channel(address, channel_options(retries=True)) as channel:
        stub = InferenceServiceStub(channel)
        while line := await asyncio.to_thread(sys.stdin.readline):
            requests = list(_requests(json.loads(line)))
            print("prepared", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            streams = await asyncio.gather(*(_read(stub, request) for request in requests))
            print(json.dumps(streams), flush=True)


def _requests(job: dict[str, Any]) -> Iterable[pb.GenerateStreamRequest]:
    for seed, length, json_schema in job["prompts"]:
        generation = build_generation(
            Prompt(seed, length).token_ids(job["vocab_size"]),
            {
                "max_tokens": job["max_tokens"],
                "temperature": 0,
                "ignore_eos": not json_schema,
            },
        )
        if json_schema:
            generation.structured_output.json_schema = json_schema
        generation.output.text = job["text"]
        yield pb.GenerateStreamRequest(generation=generation)


async def _read(stub: InferenceServiceStub, request: pb.GenerateStreamRequest) -> Stream:
    """Every token that was asked for must come, once, and without a second start."""
    stream = Stream(time.monotonic(), [], [], [], 0)
    finished = pb.Finished()
    async for response in stub.GenerateStream(request, timeout=PATIENCE):
        event = response.event
        if event.HasField("delta"):
            stream.times.append(time.monotonic())
            assert event.delta.first_token_index == len(stream.token_ids), "tokens are missing"
            stream.counts.append(event.delta.num_tokens)
            stream.token_ids.extend(event.delta.token_ids)
        elif event.HasField("started"):
            stream = stream._replace(cached=event.started.cached_prompt_tokens)
        else:
            finished.CopyFrom(event.finished)
    assert finished.finish_reason == pb.FINISH_REASON_MAX_TOKENS, finished
    assert len(stream.token_ids) == request.generation.stopping.max_tokens == sum(stream.counts)
    assert not finished.timing.preemptions + finished.timing.recoveries, finished.timing
    return stream


if __name__ == "__main__":
    asyncio.run(_serve_jobs(sys.argv[1]))
