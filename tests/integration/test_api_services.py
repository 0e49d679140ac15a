"""Model, tokenizer, embedding and admin services, health, reflection and the ports."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status

from mili.router.api.admin import WorkerStatus
from mili.router.api.server import ApiServer
from mili.router.config import RouterConfig
from mili.router.tokenizer import Tokenizer
from mili.router.worker_group import WorkerState
from mili.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)
from tests.fake_engine import (
    CONTEXT_LIMIT,
    EOS_TOKEN_ID,
    TEMPLATE,
    VOCAB_SIZE,
    FakeEngine,
    make_folder,
    running_api,
)

Api = tuple[ApiServer, FakeEngine]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    folder = make_folder(tmp_path / "demo", temperature=0.5)
    async with running_api(folder, served_model_name=("tiny", "alias")) as running:
        yield running


@pytest.fixture
async def public(api: Api) -> AsyncIterator[aio.Channel]:
    async with aio.insecure_channel(f"127.0.0.1:{api[0].public_port}") as channel:
        yield channel


@pytest.fixture
async def admin(api: Api) -> AsyncIterator[aio.Channel]:
    async with aio.insecure_channel(f"127.0.0.1:{api[0].admin_port}") as channel:
        yield channel


async def reason_of(call: Any) -> str:  # noqa: ANN401
    status = await rpc_status.aio.from_call(call)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info.reason


async def test_the_model(public: aio.Channel) -> None:
    stub = model_pb2_grpc.ModelServiceStub(public)
    (model,) = (await stub.ListModels(model_pb2.ListModelsRequest())).models
    assert (model.name, list(model.aliases)) == ("tiny", ["alias"])
    assert (model.architecture, model.dtype) == ("LlamaForCausalLM", "float32")
    assert (model.max_context_tokens, model.max_output_tokens) == (
        CONTEXT_LIMIT,
        CONTEXT_LIMIT - 1,
    )
    assert (model.vocab_size, list(model.eos_token_ids)) == (VOCAB_SIZE, [EOS_TOKEN_ID])
    assert model.chat_template_sha256 == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    assert len(model.tokenizer_sha256) == 64
    assert '"temperature": 0.5' in model.default_generation_config_json
    assert list(model.capabilities) == ["generate", "embed", "score", "chat"]
    assert model.kv_block_tokens == 16
    int(model.revision, 16)
    for name in ("", "tiny", "alias"):
        assert (await stub.GetModel(model_pb2.GetModelRequest(name=name))).model == model
    unknown = stub.GetModel(model_pb2.GetModelRequest(name="demo"))
    assert await unknown.code() is grpc.StatusCode.NOT_FOUND


async def test_pages_of_models(public: aio.Channel) -> None:
    stub = model_pb2_grpc.ModelServiceStub(public)
    page = await stub.ListModels(model_pb2.ListModelsRequest(page_size=1))
    assert (len(page.models), page.next_page_token) == (1, "")
    call = stub.ListModels(model_pb2.ListModelsRequest(page_token="x"))
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_model_without_a_template(tmp_path: Path) -> None:
    async with (
        running_api(make_folder(tmp_path / "base", template=False)) as (api, _),
        aio.insecure_channel(f"127.0.0.1:{api.public_port}") as channel,
    ):
        models = model_pb2_grpc.ModelServiceStub(channel)
        model = (await models.GetModel(model_pb2.GetModelRequest())).model
        assert (model.name, model.chat_template_sha256) == ("base", "")
        assert list(model.capabilities) == ["generate", "embed", "score"]
        chat = inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="user")])
        call = model_pb2_grpc.TokenizerServiceStub(channel).RenderChat(
            model_pb2.RenderChatRequest(chat=chat)
        )
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_tokenize_and_back(public: aio.Channel) -> None:
    stub = model_pb2_grpc.TokenizerServiceStub(public)
    texts = ["aä", "", "<|im_end|>"]
    plain = await stub.Tokenize(model_pb2.TokenizeRequest(texts=texts))
    offsets = await stub.Tokenize(model_pb2.TokenizeRequest(texts=texts, return_offsets=True))
    assert [list(result.ids) for result in plain.results] == [
        list(result.ids) for result in offsets.results
    ]
    assert not plain.results[0].start_bytes
    first = offsets.results[0]
    assert (len(first.ids), first.start_bytes[0], first.end_bytes[-1]) == (3, 0, 3)
    ids = [inference_pb2.TokenIds(ids=result.ids) for result in plain.results]
    detokenize = model_pb2.DetokenizeRequest(token_ids=ids)
    assert list((await stub.Detokenize(detokenize)).texts) == ["aä", "", ""]
    detokenize.skip_special_tokens = False
    assert list((await stub.Detokenize(detokenize)).texts) == texts


async def test_long_texts_are_tokenized_whole(public: aio.Channel) -> None:
    """The answer's bytes are made in pieces, and each text has its own."""
    stub = model_pb2_grpc.TokenizerServiceStub(public)
    texts = ["aé" * 9000, "", "b" * 8192, "c" * 200]
    request = model_pb2.TokenizeRequest(texts=texts, return_offsets=True)
    results = (await stub.Tokenize(request)).results
    for text, result in zip(texts, results, strict=True):
        characters = [character.encode() for character in text]
        ends = list(itertools.accumulate(len(each) for each in characters))
        spans = [
            span
            for each, end in zip(characters, ends, strict=True)
            for span in [(end - len(each), end)] * len(each)
        ]
        assert list(zip(result.start_bytes, result.end_bytes, strict=True)) == spans
        assert len(result.ids) == len(text.encode())
    request.return_offsets = False
    plain = (await stub.Tokenize(request)).results
    assert [list(each.ids) for each in plain] == [list(each.ids) for each in results]


def chat_of(content: str) -> inference_pb2.ChatPrompt:
    messages = [inference_pb2.ChatMessage(role="user", content=content)]
    return inference_pb2.ChatPrompt(messages=messages)


@pytest.mark.parametrize(
    "request_message",
    [
        model_pb2.DetokenizeRequest(token_ids=[inference_pb2.TokenIds(ids=[VOCAB_SIZE])]),
        model_pb2.DetokenizeRequest(token_ids=[inference_pb2.TokenIds(ids=[1] * 300_000)]),
        model_pb2.DetokenizeRequest(token_ids=[inference_pb2.TokenIds()] * 9000),
        model_pb2.TokenizeRequest(texts=["x"] * 9000),
        model_pb2.TokenizeRequest(texts=["x" * 2**22, "x"]),
        model_pb2.TokenizeRequest(texts=["x" * 2**20, "x"], return_offsets=True),
        model_pb2.RenderChatRequest(chat=chat_of("x" * 3 * 2**20)),
        model_pb2.RenderChatRequest(chat=chat_of("x" * (3 * 2**20 - 10))),
    ],
)
async def test_tokenizer_limits(public: aio.Channel, request_message: Any) -> None:  # noqa: ANN401
    stub = model_pb2_grpc.TokenizerServiceStub(public)
    call = getattr(stub, type(request_message).__name__.removesuffix("Request"))(request_message)
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await reason_of(call) == "INVALID_FIELD"


async def test_detokenized_text_is_bounded(
    public: aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "decode", lambda *_, **__: "x" * 5 * 2**20)
    stub = model_pb2_grpc.TokenizerServiceStub(public)
    lists = [inference_pb2.TokenIds(ids=[1])] * 2
    call = stub.Detokenize(model_pb2.DetokenizeRequest(token_ids=lists))
    assert await reason_of(call) == "INVALID_FIELD"


async def test_render_chat(public: aio.Channel, api: Api) -> None:
    chat = inference_pb2.ChatPrompt(
        messages=[
            inference_pb2.ChatMessage(role="system", content="be kind"),
            inference_pb2.ChatMessage(role="user", content=""),
        ],
        template_variables_json='{"shout": true}',
    )
    stub = model_pb2_grpc.TokenizerServiceStub(public)
    rendered = await stub.RenderChat(model_pb2.RenderChatRequest(model="alias", chat=chat))
    assert rendered.text == "<system>be kind<user>!<assistant>"
    generating = inference_pb2_grpc.InferenceServiceStub(public).Generate(
        inference_pb2.GenerateRequest(generation=inference_pb2.Generation(chat=chat))
    )
    request_id = await api[1].submitted.get()
    assert api[1].params[request_id].prompt_token_ids == list(rendered.token_ids)
    await api[1].run()
    assert (await generating).usage.prompt_tokens == len(rendered.token_ids)


async def test_truncated_prompts_keep_their_end(public: aio.Channel, api: Api) -> None:
    generation = inference_pb2.Generation(
        token_ids=inference_pb2.TokenIds(ids=range(200)), truncate_prompt_tokens=3
    )
    call = inference_pb2_grpc.InferenceServiceStub(public).Generate(
        inference_pb2.GenerateRequest(generation=generation)
    )
    request_id = await api[1].submitted.get()
    assert api[1].params[request_id].prompt_token_ids == [197, 198, 199]
    await api[1].run()
    await call


async def test_the_server(admin: aio.Channel, api: Api) -> None:
    stub = admin_pb2_grpc.AdminServiceStub(admin)
    server = await stub.GetServer(admin_pb2.GetServerRequest())
    assert server.version == version("mili")
    assert server.instance_id == api[0].instance_id
    assert abs(server.start_time.ToDatetime().timestamp() - time.time()) < 24 * 3600
    assert not server.workers
    (phase,) = server.startup_phases
    assert (phase.name, phase.duration.nanos) == ("read model", 250_000_000)
    limits, config = server.limits, RouterConfig(model="m")
    assert (limits.max_context_tokens, limits.max_running_sequences) == (CONTEXT_LIMIT, 256)
    for name in ("max_queued_requests", "max_unread_tokens", "max_concurrent_rpcs"):
        assert getattr(limits, name) == getattr(config, name) > 0
    assert limits.max_queue_time.ToMilliseconds() == 1000 * config.max_queue_time
    assert limits.max_message_bytes == 16 * 2**20


async def test_the_workers(admin: aio.Channel, api: Api) -> None:
    stub = admin_pb2_grpc.AdminServiceStub(admin)
    assert not (await stub.ListWorkers(admin_pb2.ListWorkersRequest())).workers
    status = WorkerStatus(
        name="w0",
        instance_id="i",
        state=WorkerState.SERVING,
        last_heartbeat=1_700_000_000.5,
        last_step_age=None,
        kv_blocks_total=9,
        kv_blocks_free=5,
        kv_blocks_cached=3,
        running_sequences=1,
        group="g",
        rank=1,
        world_size=2,
        weights_sha256=bytes([171] * 32),
        startup_phases=[("load weights", 12.5), ("capture graphs", 3)],
    )
    api[1].known_workers = [status, status._replace(name="w1", last_step_age=1.5)]
    first, second = (await stub.ListWorkers(admin_pb2.ListWorkersRequest())).workers
    assert (first.name, first.state) == ("w0", admin_pb2.WORKER_STATE_SERVING)
    assert first.last_heartbeat.ToMilliseconds() == 1_700_000_000_500
    assert (first.kv_blocks_total, first.kv_blocks_free, first.kv_blocks_cached) == (9, 5, 3)
    assert (first.instance_id, first.running_sequences) == ("i", 1)
    assert first.model == "tiny"
    assert first.model_revision == "ab" * 8
    phases = [(phase.name, phase.duration.ToMilliseconds()) for phase in first.startup_phases]
    assert phases == [("load weights", 12_500), ("capture graphs", 3000)]
    assert (first.group, first.rank, first.world_size) == ("g", 1, 2)
    assert not first.HasField("last_step_age")
    assert second.last_step_age.ToMilliseconds() == 1500
    server = await stub.GetServer(admin_pb2.GetServerRequest())
    assert list(server.workers) == [first, second], "GetServer tells how each worker started"


async def test_operators_methods_are_not_public(public: aio.Channel) -> None:
    call = admin_pb2_grpc.AdminServiceStub(public).GetServer(admin_pb2.GetServerRequest())
    assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


async def check(channel: aio.Channel, service: str) -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    response = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return int(response.status)


async def test_health(public: aio.Channel, admin: aio.Channel, api: Api) -> None:
    names = ("", "readiness", "mili.v1.InferenceService", "mili.v1.AdminService")
    for channel in (public, admin):
        for name in names:
            assert await check(channel, name) == SERVING
    await api[0].drain(1)
    for name in names:
        assert await check(public, name) == NOT_SERVING
    assert await check(public, "liveness") == SERVING
    with pytest.raises(aio.AioRpcError) as caught:
        await check(public, "nothing")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_watch(public: aio.Channel, api: Api) -> None:
    stub: Any = health_pb2_grpc.HealthStub(public)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="readiness"))
    assert (await watch.read()).status == SERVING
    api[0].set_ready(True)  # no change, no message
    api[0].set_ready(False)
    assert (await watch.read()).status == NOT_SERVING
    api[0].set_ready(True)
    assert (await watch.read()).status == SERVING
    watch.cancel()
    unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nothing"))
    assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    unknown.cancel()


async def test_health_list_by_reflection(api: Api) -> None:
    """A client that knows nothing finds and calls List, which the stock health.proto lacks."""
    address = f"127.0.0.1:{api[0].public_port}"
    async with aio.insecure_channel(address) as channel:

        def find() -> Any:  # noqa: ANN401
            with grpc.insecure_channel(address) as blocking:
                database = ProtoReflectionDescriptorDatabase(blocking)
                return DescriptorPool(database).FindServiceByName("grpc.health.v1.Health")

        method = (await asyncio.to_thread(find)).methods_by_name["List"]
        call = channel.unary_unary(
            "/grpc.health.v1.Health/List",
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        statuses = (await call(b"")).statuses
        assert statuses["liveness"].status == SERVING
        assert statuses["mili.v1.TokenizerService"].status == SERVING
        assert "" in statuses


@pytest.mark.parametrize(
    ("port", "services"),
    [
        (
            "public_port",
            {
                "mili.v1.InferenceService",
                "mili.v1.ModelService",
                "mili.v1.TokenizerService",
                "mili.v1.EmbeddingService",
            },
        ),
        ("admin_port", {"mili.v1.AdminService"}),
    ],
)
async def test_reflection(api: Api, port: str, services: set[str]) -> None:
    def look() -> tuple[set[str], set[str]]:
        with grpc.insecure_channel(f"127.0.0.1:{getattr(api[0], port)}") as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            names = set(database.get_services())
            pool = DescriptorPool(database)
            return names, {name for name in names if pool.FindServiceByName(name).methods}

    names, described = await asyncio.to_thread(look)
    always = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert names == described == services | always


async def test_a_port_in_use(tmp_path: Path, api: Api) -> None:
    folder = make_folder(tmp_path / "other")
    with pytest.raises(OSError, match=f"127.0.0.1:{api[0].public_port}.*in use"):
        async with running_api(folder, port=api[0].public_port):
            pass
    with pytest.raises(OSError, match=f"{api[0].admin_port}"):
        async with running_api(folder, admin_port=api[0].admin_port):
            pass
