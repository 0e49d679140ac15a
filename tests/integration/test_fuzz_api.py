"""Twenty thousand drawn calls to a real server: each ends as the contract says, and nothing stays.

MILI_FUZZ_CALLS sets another number of them.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import grpc
import hypothesis
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from hypothesis import strategies as st

from mili.v1 import admin_pb2, embedding_pb2, inference_pb2, model_pb2
from mili.v1.admin_pb2_grpc import AdminServiceStub
from tests.fuzz.calls import PATIENCE, Call, Caller, Verdict, calling
from tests.fuzz.messages import messages, spoilt
from tests.model_folders import make_model_folder
from tests.serving import STEADY, Served, serving
from tests.streams import until_quiet

NUM_CALLS = int(os.environ.get("MILI_FUZZ_CALLS", "20000"))
# Of one example, so that the time goes into calls and not into hypothesis.
SHOTS_AN_EXAMPLE, SPOILT = 4, 3
PARTS = 8
MAX_GROWTH = 48  # MiB
MODULES = (inference_pb2, model_pb2, embedding_pb2, admin_pb2, health_pb2)
# What costs most is drawn least.
SHARES = {"Generate": 6, "GenerateStream": 6, "Embed": 2, "Score": 2, "WatchLoad": 1}


def methods() -> list[MethodDescriptor]:
    return [
        method
        for module in MODULES
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


class Shot(NamedTuple):
    """A method, a drawn request for it, and the seed of all that is done with it."""

    method: MethodDescriptor
    request: bytes
    seed: int

    def calls(self) -> Iterator[Call]:
        """The request as it was drawn, then spoilt in several ways."""
        source = random.Random(self.seed)
        assert self.method.containing_service is not None
        name = f"/{self.method.containing_service.full_name}/{self.method.name}"
        for request in (self.request, *(spoilt(self.request, source) for _ in range(SPOILT))):
            timeout = source.choice([PATIENCE] * 8 + [0.001, 0.01, 0.3])
            # A watch tells of changes, and there may be none.
            reads = 1 if self.method.name.startswith("Watch") else source.choice([1, 3, 1000])
            yield Call(name, self.method.server_streaming, request, timeout, reads)


def shots_of(method: MethodDescriptor) -> st.SearchStrategy[Shot]:
    requests = messages(GetMessageClass(method.input_type))
    return st.builds(Shot, st.just(method), requests, st.integers(0, 2**32))


SHOTS = st.sampled_from(
    [method for method in methods() for _ in range(SHARES.get(method.name, 1))]
).flatmap(shots_of)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("fuzz")
    model = make_model_folder(path / "model", max_position_embeddings=64, layers=1)
    settings = {"MILI_MAX_QUEUED_REQUESTS": "64", "MILI_WORKER_TIMEOUT": "30"}
    with serving(model, path / "log", **settings, **STEADY) as served:
        yield served


@pytest.mark.timeout(3600)
def test_drawn_calls(served: Served) -> None:
    (router,) = served.children("router")
    with grpc.insecure_channel(served.admin) as channel:
        operator = AdminServiceStub(channel)
        with undraining(operator), calling(served.address, served.admin) as caller:
            sizes = []
            for part in range(PARTS):
                draw(caller, NUM_CALLS // PARTS, seed=part)
                sizes.append(router.memory_info().rss >> 20)
        asyncio.run(until_quiet(served.admin))
        load = next(operator.WatchLoad(admin_pb2.WatchLoadRequest(), timeout=PATIENCE)).load
    assert (load.queued_requests, load.running_sequences) == (0, 0)
    assert served.log.read_text().count("our fault") == 0
    print(f"the router's MiB after each part: {sizes}")
    # What is loaded and remembered once is there after the first half.
    assert sizes[-1] - sizes[PARTS // 2 - 1] < MAX_GROWTH, sizes
    check_variety(caller.verdicts)


@contextmanager
def undraining(operator: AdminServiceStub) -> Iterator[None]:
    """Take back at once what a drawn call does to the only worker."""
    over = threading.Event()
    request = admin_pb2.UndrainWorkerRequest(name="worker-0")

    def work() -> None:
        while not over.wait(0.1):
            with suppress(grpc.RpcError):  # it may be away for a moment
                operator.UndrainWorker(request)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def draw(caller: Caller, count: int, seed: int) -> None:
    """Draw calls and wait for their ends."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count // (SHOTS_AN_EXAMPLE * (1 + SPOILT)),
        database=None,
        deadline=None,
        # A call that fails is shown as it was; what led to it could not be told again.
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.lists(SHOTS, min_size=SHOTS_AN_EXAMPLE, max_size=SHOTS_AN_EXAMPLE))
    def run(shots: list[Shot]) -> None:
        for shot in shots:
            for call in shot.calls():
                caller.call(call)

    run()
    caller.finish()


def check_variety(verdicts: Counter[tuple[str, Verdict]]) -> None:
    """The calls must have come to what they are for, or they proved nothing."""
    assert verdicts.total() >= NUM_CALLS * 0.99
    reached = {method.rpartition("/")[2] for method, _ in verdicts}
    assert reached == {method.name for method in methods()}
    for method, verdict in sorted(verdicts):
        print(f"{verdicts[method, verdict]:6} {method} {verdict.code} {verdict.reason}")
    for method in ("Generate", "GenerateStream"):
        name = f"/mili.v1.InferenceService/{method}"
        answered = verdicts[name, Verdict("OK", "")] + verdicts[name, Verdict("LEFT", "")]
        assert answered > NUM_CALLS / 250, method
