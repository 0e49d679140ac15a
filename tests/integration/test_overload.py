"""Overload for real: a router process, a worker process that can do 20 calls a second, and gRPC."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_status import rpc_status

from mili.v1 import inference_pb2 as pb
from mili.v1.inference_pb2_grpc import InferenceServiceStub
from tests.fake_engine import make_folder
from tests.serving import MILI, free_port
from tests.virtual_cluster import percentile, poisson

WORKER = Path(__file__).parents[1] / "timed_worker.py"
# A row is taken again one step after its last, because that step was sent before its end was known.
ROWS, OUTPUT_TOKENS, CAPACITY = 8, 16, 20.0
STEP_SECONDS = ROWS / (CAPACITY * (OUTPUT_TOKENS + 1))
MAX_QUEUE_TIME = 0.15
PHASE_SECONDS = 10.0


class Seen(NamedTuple):
    """What a caller saw; times in seconds since the call, ended_at by the loop's clock."""

    first_token: float | None
    total: float
    ended_at: float
    error: grpc.RpcError | None


@contextmanager
def serving_paced(tmp_path: Path) -> Iterator[str]:
    """Serve; the API's address."""
    folder = make_folder(tmp_path / "model").path
    link, address = f"tcp://127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    ports = ["--port", address.partition(":")[2], "--admin-port", str(free_port())]
    router = [*MILI, "router", str(folder), "--worker-link", link, *ports]
    # One row more: the null row.
    speed = [f"--step-seconds={STEP_SECONDS}", f"--max-rows={ROWS + 1}"]
    worker = [sys.executable, str(WORKER), link, str(folder), *speed]
    with ExitStack() as stack:
        log = stack.enter_context((tmp_path / "log").open("w"))
        environment = {**os.environ, "MILI_MAX_QUEUE_TIME": str(MAX_QUEUE_TIME)}
        for command in (router, worker):
            process = subprocess.Popen(command, stderr=log, env=environment)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        options = (("grpc.initial_reconnect_backoff_ms", 100),)
        with grpc.insecure_channel(address, options) as channel:
            request = health_pb2.HealthCheckRequest(service="readiness")
            watch = HealthStub(channel).Watch(request, wait_for_ready=True, timeout=60)
            while next(watch).status != health_pb2.HealthCheckResponse.SERVING:
                pass
            watch.cancel()
        yield address


async def call(stub: InferenceServiceStub, prompt: list[int]) -> Seen:
    request = pb.GenerateStreamRequest()
    request.generation.token_ids.ids.extend(prompt)
    request.generation.stopping.max_tokens = OUTPUT_TOKENS
    begin, first, error = time.monotonic(), None, None
    try:
        async for response in stub.GenerateStream(request, timeout=30):
            if first is None and response.event.HasField("delta"):
                first = time.monotonic() - begin
    except grpc.RpcError as failure:
        error = failure
    end = time.monotonic()
    return Seen(first, end - begin, end, error)


async def offer(stub: InferenceServiceStub, rate: float, seed: int) -> tuple[list[Seen], float]:
    """Calls by a Poisson process; what they saw, and how many completed a second meanwhile."""
    source = random.Random(seed)
    begin = time.monotonic()
    tasks = []
    for at in poisson(source, rate, 0.0, PHASE_SECONDS):
        await asyncio.sleep(max(0.0, begin + at - time.monotonic()))
        prompt = source.choices(range(200), k=20)
        tasks.append(asyncio.create_task(call(stub, prompt)))
    end = time.monotonic()
    seen = await asyncio.gather(*tasks)
    # Without the time in which the first ones are on their way.
    warm = begin + 2 * OUTPUT_TOKENS * STEP_SECONDS
    done = sum(each.error is None and warm <= each.ended_at < end for each in seen)
    return seen, done / (end - warm)


def check_refusals(seen: list[Seen]) -> None:
    """Every call that failed was told so, when to come again, and most at once."""
    failed = [each for each in seen if each.error is not None]
    reasons: dict[str, list[float]] = {}
    for each in failed:
        assert each.error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(each.error.trailing_metadata())
        assert int(trailers["grpc-retry-pushback-ms"]) >= 100
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        for detail in rpc_status.from_call(each.error).details:
            detail.Unpack(info) or detail.Unpack(retry)
        pushback = int(trailers["grpc-retry-pushback-ms"])
        assert abs(retry.retry_delay.ToMicroseconds() / 1000 - pushback) <= 1
        reasons.setdefault(info.reason, []).append(each.total)
    assert set(reasons) <= {"QUEUE_FULL", "QUEUE_TIMEOUT"}
    refused = reasons["QUEUE_FULL"]
    print({reason: len(times) for reason, times in reasons.items()})
    p50, p95, p99 = (percentile(refused, percent) * 1e3 for percent in (50, 95, 99))
    print(f"refused in {p50:.1f} ms (p50), {p95:.1f} ms (p95), {p99:.1f} ms (p99)")
    # The caller shares two cores with the server, and with whatever else runs here.
    assert p95 < 20
    assert max(reasons.get("QUEUE_TIMEOUT", [0.0])) < MAX_QUEUE_TIME + 0.1


@pytest.mark.slow
async def test_a_flood_changes_nothing_for_those_who_are_served(tmp_path: Path) -> None:
    with serving_paced(tmp_path) as address:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = InferenceServiceStub(channel)
            await offer(stub, 5.0, 0)
            usual, _ = await offer(stub, 0.8 * CAPACITY, 1)
            waits = [each.first_token for each in usual if each.first_token is not None]
            limit = 2 * percentile(waits, 99)
            print(f"80 %: p99 TTFT {limit / 2 * 1e3:.0f} ms")
            for load in (2.0, 5.0):
                seen, rate = await offer(stub, load * CAPACITY, 2)
                waits = [each.first_token for each in seen if each.first_token is not None]
                p99 = percentile(waits, 99)
                print(f"{load:g}: {rate:.1f} calls/s of {CAPACITY:g}, p99 TTFT {p99 * 1e3:.0f} ms")
                assert rate >= 0.95 * CAPACITY
                assert p99 <= limit
                check_refusals(seen)
            await asyncio.sleep(1.0)
            after, _ = await offer(stub, 0.5 * CAPACITY, 3)
            turned_away = [each.total for each in after if each.error is not None]
            print(f"one second later, half the load: {len(turned_away)} of {len(after)} refused")
            # Eight rows now and then have more to do than that, as before the flood.
            assert len(turned_away) <= 0.05 * len(after)
