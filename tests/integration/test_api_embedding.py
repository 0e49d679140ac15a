"""EmbeddingService over real sockets, on a fake engine: what is asked, refused and charged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc import aio
from grpc_status import rpc_status

from mili.internal.v1.step_pb2 import TASK_EMBED, TASK_SCORE
from mili.router.api.server import ApiServer
from mili.router.errors import Reason
from mili.router.outcome import Finish, FinishReason
from mili.v1 import embedding_pb2 as pb
from mili.v1 import embedding_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.fake_engine import CONTEXT_LIMIT, FakeEngine, make_folder, refuse_with, running_api

Stub: TypeAlias = "embedding_pb2_grpc.EmbeddingServiceAsyncStub"


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[tuple[ApiServer, FakeEngine]]:
    async with running_api(make_folder(tmp_path / "demo")) as running:
        yield running


@pytest.fixture
def engine(api: tuple[ApiServer, FakeEngine]) -> FakeEngine:
    return api[1]


@pytest.fixture
async def channel(api: tuple[ApiServer, FakeEngine]) -> AsyncIterator[aio.Channel]:
    async with aio.insecure_channel(f"127.0.0.1:{api[0].public_port}") as channel:
        yield channel


@pytest.fixture
def stub(channel: aio.Channel) -> Stub:
    return embedding_pb2_grpc.EmbeddingServiceStub(channel)


def given(*ids: int, text: str = "") -> pb.EmbedInput:
    if text:
        return pb.EmbedInput(text=text)
    return pb.EmbedInput(token_ids=inference_pb2.TokenIds(ids=ids))


async def answered(call: Any, engine: FakeEngine) -> Any:  # noqa: ANN401
    """Run whatever is submitted until the call has ended."""
    task = asyncio.ensure_future(call)
    while not task.done():
        engine.step()
        await asyncio.sleep(0.001)
    return await task


async def refusal(call: Any) -> tuple[str, str]:  # noqa: ANN401
    """The reason and the field of a call that fails."""
    status = await rpc_status.aio.from_call(call)
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    if len(status.details) > 1 and status.details[1].Unpack(request):
        return info.reason, request.field_violations[0].field
    return info.reason, ""


async def test_vectors_in_order(stub: Stub, engine: FakeEngine) -> None:
    request = pb.EmbedRequest(inputs=[given(1, 2), given(text="abc")], dimensions=2)
    response = await answered(stub.Embed(request), engine)
    assert [list(each.values) for each in response.embeddings] == [pytest.approx([0.6, 0.8])] * 2
    prompts = [params.prompt_token_ids for params in engine.params.values()]
    assert [len(each) for each in prompts] == [2, 3]
    assert {params.task for params in engine.params.values()} == {TASK_EMBED}
    assert response.usage.prompt_tokens == 5
    assert response.usage.completion_tokens == 0


async def test_a_vector_as_it_is(stub: Stub, engine: FakeEngine) -> None:
    request = pb.EmbedRequest(inputs=[given(1)], normalize=False)
    response = await answered(stub.Embed(request), engine)
    assert list(response.embeddings[0].values) == [3, 4, 12, 84]


async def test_more_inputs_than_run_at_once(stub: Stub, engine: FakeEngine) -> None:
    call = stub.Embed(pb.EmbedRequest(inputs=[given(1)] * 200))
    for _ in range(64):
        await engine.submitted.get()
    await asyncio.sleep(0.02)
    assert len(engine.lengths) == 64
    assert len((await answered(call, engine)).embeddings) == 200


async def test_scores(stub: Stub, engine: FakeEngine) -> None:
    request = pb.ScoreRequest(context=given(7, 8, 9), continuations=[given(1), given(2, 3)])
    response = await answered(stub.Score(request), engine)
    assert [(each.logprob, each.num_tokens) for each in response.scores] == [(-1.5, 1), (-3.5, 2)]
    assert not any(each.is_greedy for each in response.scores)
    params = list(engine.params.values())
    assert [list(each.prompt_token_ids) for each in params] == [[7, 8, 9, 1], [7, 8, 9, 2, 3]]
    assert {(each.task, each.score_from) for each in params} == {(TASK_SCORE, 3)}
    assert response.usage.prompt_tokens == 6


async def test_the_first_of_all_continuations_runs_before_the_others(
    stub: Stub, engine: FakeEngine
) -> None:
    call = stub.Score(pb.ScoreRequest(context=given(7), continuations=[given(1)] * 3))
    await engine.submitted.get()
    await asyncio.sleep(0.02)
    assert len(engine.lengths) == 1
    await answered(call, engine)


CONTEXT = given(*[1] * (CONTEXT_LIMIT - 2))
REFUSED: list[tuple[str, Any, str, str]] = [
    ("Embed", pb.EmbedRequest(), "INVALID_FIELD", "inputs"),
    ("Embed", pb.EmbedRequest(inputs=[given(1)] * 1025), "INVALID_FIELD", "inputs"),
    ("Embed", pb.EmbedRequest(inputs=[given(1), pb.EmbedInput()]), "INVALID_FIELD", "inputs[1]"),
    ("Embed", pb.EmbedRequest(inputs=[given()]), "INVALID_FIELD", "inputs[0]"),
    ("Embed", pb.EmbedRequest(inputs=[given(320)]), "INVALID_FIELD", "inputs[0]"),
    ("Embed", pb.EmbedRequest(inputs=[given(1)], dimensions=0), "INVALID_FIELD", "dimensions"),
    ("Embed", pb.EmbedRequest(inputs=[given(1)], dimensions=5), "INVALID_FIELD", "dimensions"),
    ("Embed", pb.EmbedRequest(model="x", inputs=[given(1)]), "MODEL_NOT_FOUND", "model"),
    (
        "Embed",
        pb.EmbedRequest(inputs=[given(*[1] * CONTEXT_LIMIT)]),
        "CONTEXT_TOO_LONG",
        "inputs[0]",
    ),
    (
        "Embed",
        pb.EmbedRequest(inputs=[given(1)], scheduling=inference_pb2.SchedulingHints(priority=101)),
        "INVALID_FIELD",
        "scheduling.priority",
    ),
    ("Score", pb.ScoreRequest(context=given(1)), "INVALID_FIELD", "continuations"),
    ("Score", pb.ScoreRequest(continuations=[given(1)]), "INVALID_FIELD", "context"),
    (
        "Score",
        pb.ScoreRequest(model="x", context=given(1), continuations=[given(1)]),
        "MODEL_NOT_FOUND",
        "model",
    ),
    (
        "Score",
        pb.ScoreRequest(
            context=given(1),
            continuations=[given(1)],
            scheduling=inference_pb2.SchedulingHints(session_id="x" * 129),
        ),
        "INVALID_FIELD",
        "scheduling.session_id",
    ),
    (
        "Score",
        pb.ScoreRequest(context=given(), continuations=[given(1)]),
        "INVALID_FIELD",
        "context",
    ),
    (
        "Score",
        pb.ScoreRequest(context=given(1), continuations=[given(1), given()]),
        "INVALID_FIELD",
        "continuations[1]",
    ),
    (
        "Score",
        pb.ScoreRequest(context=CONTEXT, continuations=[given(1), given(1, 2)]),
        "CONTEXT_TOO_LONG",
        "continuations[1]",
    ),
]


@pytest.mark.parametrize(("method", "request_", "reason", "field"), REFUSED)
async def test_what_is_refused(
    stub: Stub,
    engine: FakeEngine,
    method: str,
    request_: Message,
    reason: str,
    field: str,
) -> None:
    assert await refusal(getattr(stub, method)(request_)) == (reason, field)
    assert not engine.params


@pytest.mark.parametrize("method", ["Embed", "Score"])
async def test_every_pass_is_scheduled_as_asked(
    stub: Stub, engine: FakeEngine, method: str
) -> None:
    hints = inference_pb2.SchedulingHints(priority=7, session_id="chat 5")
    hints.max_queue_time.FromMilliseconds(1500)
    requests = {
        "Embed": pb.EmbedRequest(model="demo", inputs=[given(1), given(2)], scheduling=hints),
        "Score": pb.ScoreRequest(
            model="demo", context=given(1), continuations=[given(1), given(2)], scheduling=hints
        ),
    }
    before = time.monotonic()
    await answered(getattr(stub, method)(requests[method], timeout=30), engine)
    scheduled = [params.scheduling for params in engine.params.values()]
    assert len(scheduled) == 2
    for each in scheduled:
        assert (each.priority, each.session_id, each.max_queue_time) == (7, "chat 5", 1.5)
        assert before < each.deadline < before + 40


async def test_one_that_fails_ends_all(stub: Stub, engine: FakeEngine) -> None:
    call = stub.Embed(pb.EmbedRequest(inputs=[given(1), given(2), given(3)]))
    ids = [await engine.submitted.get() for _ in range(3)]
    error = refuse_with(Reason.NUMERIC_FAULT)
    engine.finish(ids[1], Finish(FinishReason.ERROR, error=error))
    assert (await refusal(call))[0] == "NUMERIC_FAULT"
    cancelled = {engine.cancelled.get_nowait() for _ in range(2)}
    assert cancelled == {ids[0], ids[2]}


async def test_a_caller_that_leaves_leaves_nothing(stub: Stub, engine: FakeEngine) -> None:
    call = stub.Embed(pb.EmbedRequest(inputs=[given(1), given(2)]))
    for _ in range(2):
        await engine.submitted.get()
    call.cancel()
    for _ in range(2):
        await asyncio.wait_for(engine.cancelled.get(), 10)


@pytest.mark.parametrize("field", ["top_logprobs", "prompt_top_logprobs"])
async def test_alternatives_have_a_limit(channel: aio.Channel, field: str) -> None:
    generation = inference_pb2.Generation(
        text="x", output=inference_pb2.OutputOptions(**{field: 21})
    )
    call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
        inference_pb2.GenerateRequest(generation=generation)
    )
    assert await refusal(call) == ("INVALID_FIELD", f"generation.output.{field}")
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_prompts_logprobs_that_do_not_fit_a_message(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "long", context_limit=40_000)
    generation = inference_pb2.Generation(
        token_ids=inference_pb2.TokenIds(ids=[1] * 20_000),
        output=inference_pb2.OutputOptions(prompt_top_logprobs=20),
    )
    async with running_api(folder) as (server, engine):
        engine.context_limit = 40_000
        async with aio.insecure_channel(f"127.0.0.1:{server.public_port}") as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            call = stub.Generate(inference_pb2.GenerateRequest(generation=generation))
            assert await refusal(call) == (
                "INVALID_FIELD",
                "generation.output.prompt_top_logprobs",
            )
            assert "use GenerateStream" in await call.details()
            assert not engine.params
