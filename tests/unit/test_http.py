"""OpenAI's HTTP API in front of a scripted server, through OpenAI's own client."""

from __future__ import annotations

import asyncio
import functools
import gc
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import openai
import pytest
import uvicorn
from google.rpc import code_pb2, error_details_pb2

from mili.client import AsyncClient
from mili.client.http.app import make_app
from mili.v1 import embedding_pb2
from mili.v1 import inference_pb2 as pb
from tests.scripted_server import (
    ScriptedServer,
    delta,
    endless,
    finished,
    refuse,
    running_server,
    started,
)
from tests.serving import free_port

PATIENCE = 10.0
USER: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with running_server() as scripted:
        yield scripted


@pytest.fixture
async def front(server: ScriptedServer) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client, connected to the front of the server."""
    port = free_port()
    async with AsyncClient(server.address, retries=False) as client:
        config = uvicorn.Config(make_app(client), port=port, log_config=None, lifespan="off")
        http = uvicorn.Server(config)
        serving = asyncio.create_task(http._serve())
        while not http.started:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        base_url = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(
            base_url=base_url, api_key="secret", max_retries=0, timeout=PATIENCE
        ) as connected:
            yield connected
        http.should_exit = True
        await serving


async def post(front: openai.AsyncOpenAI, path: str, body: object) -> tuple[int, dict[str, Any]]:
    """A raw request, for what OpenAI's client would not send."""
    try:
        return 200, await front.post(path, cast_to=object, body=body)  # type: ignore[return-value]
    except openai.APIStatusError as error:
        return error.status_code, error.response.json()["error"]


def asked(server: ScriptedServer) -> pb.Generation:
    request = server.requests[-1]
    assert isinstance(request, (pb.GenerateRequest, pb.GenerateStreamRequest))
    return request.generation


# Answers.


async def test_chat(server: ScriptedServer, front: openai.AsyncOpenAI) -> None:
    answer = await front.chat.completions.create(model="m", messages=USER)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role) == ("Hello", "assistant")
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (3, 5)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert asked(server).model == "m"
    assert server.tokens == ["Bearer secret"]


async def test_chat_stream(front: openai.AsyncOpenAI) -> None:
    stream = await front.chat.completions.create(
        model="m", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert [delta.content for delta in deltas] == ["", "Hel", "lo", None]
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None, None, None, "stop"]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 2
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {"chatcmpl-r1"}


async def test_sequences_tools_reasoning_and_log_probabilities(
    server: ScriptedServer, front: openai.AsyncOpenAI
) -> None:
    token = pb.TokenLogprob(
        token_id=1,
        token=b"\xe2x",
        logprob=-0.5,
        rank=1,
        top=[pb.TokenLogprob(token_id=2, token=b"y", logprob=-1.0, rank=2)],
    )
    logprobs = pb.TokenLogprobs(tokens=[token])
    server.response = pb.GenerateResponse(
        request_id="r9",
        sequences=[
            pb.GeneratedSequence(
                reasoning_text="so",
                tool_calls=[pb.ToolCall(id="c1", name="add", arguments_json="{}")],
                finish_reason=pb.FINISH_REASON_TOOL_CALLS,
            ),
            pb.GeneratedSequence(
                text="B", logprobs=logprobs, finish_reason=pb.FINISH_REASON_MAX_TOKENS
            ),
        ],
    )
    answer = await front.chat.completions.create(model="m", messages=USER, n=2, logprobs=True)
    first, second = answer.choices
    assert (first.message.content, first.finish_reason) == (None, "tool_calls")
    assert first.message.model_extra == {"reasoning_content": "so"}
    assert first.message.tool_calls is not None
    call = first.message.tool_calls[0]
    assert call.type == "function"
    assert (call.id, call.function.name, call.function.arguments) == ("c1", "add", "{}")
    assert (second.message.content, second.finish_reason, second.index) == ("B", "length", 1)
    assert second.logprobs is not None and second.logprobs.content is not None
    told = second.logprobs.content[0]
    assert (told.token, told.bytes, told.logprob) == ("\ufffdx", [0xE2, 0x78], -0.5)
    assert told.top_logprobs[0].token == "y"
    assert answer.id == "chatcmpl-r9"


async def test_tool_calls_stream(server: ScriptedServer, front: openai.AsyncOpenAI) -> None:
    def call(**fields: Any) -> pb.StreamEvent:  # noqa: ANN401
        return pb.StreamEvent(delta=pb.Delta(tool_calls=[pb.ToolCallDelta(**fields)]))

    end = pb.Finished(finish_reason=pb.FINISH_REASON_TOOL_CALLS)
    server.events = lambda _: iter(
        [
            started(),
            pb.StreamEvent(delta=pb.Delta(reasoning_text="so")),
            call(id="c1", name="add", arguments_json_fragment='{"a"'),
            call(arguments_json_fragment=": 1}"),
            pb.StreamEvent(finished=end),
        ]
    )
    stream = await front.chat.completions.create(model="m", messages=USER, stream=True)
    chunks = [chunk.choices[0] async for chunk in stream]
    calls = [c.delta.tool_calls[0] for c in chunks if c.delta.tool_calls]
    assert [call.id for call in calls] == ["c1", None]
    assert "".join(c.function.arguments for c in calls if c.function and c.function.arguments) == (
        '{"a": 1}'
    )
    assert chunks[1].delta.model_extra == {"reasoning_content": "so"}
    assert chunks[-1].finish_reason == "tool_calls"


async def test_completions_of_several_prompts(
    server: ScriptedServer, front: openai.AsyncOpenAI
) -> None:
    answer = await front.completions.create(model="m", prompt=["a", "b"], n=1)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "Hello"), (1, "Hello")]
    assert answer.usage is not None and answer.usage.prompt_tokens == 6
    assert asked(server).stopping.max_tokens == 16
    await front.completions.create(model="m", prompt=[5, 6])
    assert list(asked(server).token_ids.ids) == [5, 6]


async def test_completions_stream(front: openai.AsyncOpenAI) -> None:
    stream = await front.completions.create(
        model="m", prompt=["a", "b"], stream=True, stream_options={"include_usage": True}
    )
    texts = {0: "", 1: ""}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        usage = chunk.usage
    assert texts == {0: "Hello", 1: "Hello"}
    assert usage is not None and usage.prompt_tokens == 6


async def test_log_probabilities_of_completions(
    server: ScriptedServer, front: openai.AsyncOpenAI
) -> None:
    def token(text: bytes) -> pb.TokenLogprob:
        return pb.TokenLogprob(
            token=text, logprob=-1.0, top=[pb.TokenLogprob(token=b"z", logprob=-2.0)]
        )

    def piece(*texts: bytes) -> pb.StreamEvent:
        tokens = pb.TokenLogprobs(tokens=map(token, texts))
        return pb.StreamEvent(delta=pb.Delta(text="x", logprobs=tokens))

    events = [started(), piece(b"He", b"l"), piece(b"lo"), finished()]
    server.events = lambda _: iter(events)
    stream = await front.completions.create(model="m", prompt="a", logprobs=1, stream=True)
    found = [c.choices[0].logprobs async for c in stream]
    assert [told.text_offset for told in found if told] == [[0, 2], [3]]
    assert found[0] is not None
    assert (found[0].tokens, found[0].top_logprobs) == (["He", "l"], [{"z": -2.0}, {"z": -2.0}])
    assert asked(server).output.top_logprobs == 1


@pytest.mark.parametrize("encoding", ["float", "base64", openai.omit])
async def test_embeddings(server: ScriptedServer, front: openai.AsyncOpenAI, encoding: Any) -> None:  # noqa: ANN401
    answer = await front.embeddings.create(
        model="m", input=["abc", "a"], encoding_format=encoding, dimensions=2
    )
    if encoding != "base64":
        assert [item.embedding for item in answer.data] == [[3.0, 0.5], [1.0, 0.5]]
    assert answer.usage.prompt_tokens == 9
    (request,) = server.requests
    assert isinstance(request, embedding_pb2.EmbedRequest)
    assert request.dimensions == 2


async def test_models(front: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in front.models.list()] == ["m"]
    assert (await front.models.retrieve("other")).id == "m"
    with pytest.raises(openai.NotFoundError):
        await front.models.retrieve("none")


# What a body asks for.


async def test_every_field_of_a_chat(server: ScriptedServer, front: openai.AsyncOpenAI) -> None:
    function: Any = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
    messages: Any = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    await front.chat.completions.create(
        model="m",
        messages=messages,
        tools=[{"type": "function", "function": function}],
        tool_choice="auto",
        parallel_tool_calls=True,
        n=2,
        temperature=0.5,
        top_p=0.25,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"7": -100},
        seed=11,
        stop="END",
        max_completion_tokens=5,
        logprobs=True,
        top_logprobs=3,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        extra_body={
            "top_k": 4,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "min_tokens": 2,
            "allowed_token_ids": [1],
            "stop_token_ids": [9],
            "include_stop_str_in_output": True,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "truncate_prompt_tokens": 8,
            "cache_salt": "s",
            "include_reasoning": True,
            "chat_template_kwargs": {"enable_thinking": False},
            "continue_final_message": True,
        },
    )
    assert asked(server) == pb.Generation(
        model="m",
        chat=pb.ChatPrompt(
            messages=[
                pb.ChatMessage(role="system", content="ab"),
                pb.ChatMessage(
                    role="assistant",
                    tool_calls=[pb.ToolCall(id="c1", name="add", arguments_json="{}")],
                ),
                pb.ChatMessage(role="tool", content="3", tool_call_id="c1"),
            ],
            tools=[
                pb.ToolDefinition(
                    name="add", description="Adds.", parameters_json_schema='{"type": "object"}'
                )
            ],
            template_variables_json='{"enable_thinking": false}',
            continue_final_message=True,
        ),
        sampling=pb.SamplingParams(
            temperature=0.5,
            top_p=0.25,
            top_k=4,
            min_p=0.125,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            repetition_penalty=1.5,
            seed=11,
            logit_bias={7: -100.0},
            allowed_token_ids=[1],
            num_sequences=2,
        ),
        stopping=pb.StopConditions(
            max_tokens=5,
            min_tokens=2,
            stop_sequences=["END"],
            stop_token_ids=[9],
            include_stop_text=True,
            ignore_eos=True,
        ),
        output=pb.OutputOptions(
            token_ids=True,
            timing=True,
            top_logprobs=3,
            skip_special_tokens=False,
            parse_reasoning=True,
            parse_tool_calls=True,
        ),
        structured_output=pb.StructuredOutput(json_schema="{}", after_reasoning=True),
        cache=pb.CacheOptions(salt="s"),
        truncate_prompt_tokens=8,
    )


async def test_a_plain_chat_asks_for_nothing_else(
    server: ScriptedServer, front: openai.AsyncOpenAI
) -> None:
    await front.chat.completions.create(model="m", messages=USER)
    plain = pb.Generation(
        model="m",
        chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="Hi")]),
        output=pb.OutputOptions(token_ids=True, timing=True),
    )
    plain.sampling.SetInParent()
    plain.stopping.SetInParent()
    assert asked(server) == plain


REFUSED: list[tuple[dict[str, Any], str | None]] = [
    ({"temprature": 1}, "temprature"),
    ({"messages": [{"role": "user", "content": "Hi", "colour": "red"}]}, "messages.0.colour"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.",
    ),
    ({"messages": []}, "messages"),
    ({"model": None}, "model"),
    ({"temperature": "hot"}, "temperature"),
    ({"n": 0}, "n"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"functions": []}, "functions"),
    ({"store": True}, "store"),
    ({"stream_options": {"include_usage": True}}, None),
    ({"top_logprobs": 2}, None),
    ({"max_tokens": 1, "max_completion_tokens": 1}, None),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"seed": -1}, None),
]


async def test_refused_by_name(server: ScriptedServer, front: openai.AsyncOpenAI) -> None:
    for extra, param in REFUSED:
        body = {"model": "m", "messages": USER, **extra}
        status, error = await post(front, "/chat/completions", body)
        assert (status, error["type"], server.calls) == (400, "invalid_request_error", 0)
        if param is None:
            assert error["param"] is None
        else:
            assert error["param"].startswith(param)
            assert param in error["message"]


async def test_bodies_that_are_none(server: ScriptedServer, front: openai.AsyncOpenAI) -> None:
    for body in ([], "x", None, {"model": "m", "prompt": []}, {"model": "m", "prompt": [[]] * 257}):
        assert (await post(front, "/completions", body))[0] == 400
    huge = {"model": "m", "prompt": "x" * 17 * 2**20}
    assert (await post(front, "/completions", huge))[0] == 413
    assert (await post(front, "/nothing", {}))[0] == 404
    assert (await post(front, "/models", {}))[0] == 405
    assert server.calls == 0


# Errors.


CODES = [
    (code_pb2.INVALID_ARGUMENT, 400),
    (code_pb2.UNAUTHENTICATED, 401),
    (code_pb2.PERMISSION_DENIED, 403),
    (code_pb2.NOT_FOUND, 404),
    (code_pb2.ALREADY_EXISTS, 409),
    (code_pb2.UNIMPLEMENTED, 501),
    (code_pb2.INTERNAL, 500),
    (code_pb2.UNAVAILABLE, 503),
    (code_pb2.DEADLINE_EXCEEDED, 504),
]


async def test_codes(server: ScriptedServer, front: openai.AsyncOpenAI) -> None:
    for code, status in CODES:
        server.events = functools.partial(refuse, code=code)
        for stream in (False, True):
            body = {"model": "m", "messages": USER, "stream": stream}
            found, error = await post(front, "/chat/completions", body)
            assert (found, error["message"]) == (status, "no")


async def test_when_to_try_again(server: ScriptedServer, front: openai.AsyncOpenAI) -> None:
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(1500)
    info = error_details_pb2.ErrorInfo(reason="QUEUE_FULL")
    server.events = lambda context: refuse(context, code_pb2.RESOURCE_EXHAUSTED, info, retry)
    with pytest.raises(openai.RateLimitError) as caught:
        await front.chat.completions.create(model="m", messages=USER, stream=True)
    headers = caught.value.response.headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("2", "1500")
    assert caught.value.code == "QUEUE_FULL"
    assert server.calls == 1


async def test_the_field_has_openais_name(
    server: ScriptedServer, front: openai.AsyncOpenAI
) -> None:
    field = "generation.stopping.stop_sequences"
    bad = error_details_pb2.BadRequest(
        field_violations=[error_details_pb2.BadRequest.FieldViolation(field=field)]
    )
    server.events = lambda context: refuse(context, code_pb2.INVALID_ARGUMENT, bad)
    with pytest.raises(openai.BadRequestError) as caught:
        await front.chat.completions.create(model="m", messages=USER)
    assert caught.value.param == "stop"


async def test_an_error_in_the_middle_of_a_stream(
    server: ScriptedServer, front: openai.AsyncOpenAI
) -> None:
    def events(context: grpc.ServicerContext) -> Iterator[pb.StreamEvent]:
        yield from (started(), delta("Hel", 1))
        yield from refuse(context, code_pb2.UNAVAILABLE)

    server.events = events
    stream = await front.chat.completions.create(model="m", messages=USER, stream=True)
    texts = []
    with pytest.raises(openai.APIError, match="no"):  # noqa: PT012
        async for chunk in stream:
            texts.append(chunk.choices[0].delta.content)
    assert texts == ["", "Hel"]


async def test_one_failed_sequence_fails_the_call(
    server: ScriptedServer, front: openai.AsyncOpenAI
) -> None:
    error = pb.Error(code=13, reason="NUMERIC_FAULT", message="NaN")
    bad = pb.GeneratedSequence(finish_reason=pb.FINISH_REASON_ERROR, error=error)
    server.response = pb.GenerateResponse(sequences=[pb.GeneratedSequence(text="fine"), bad])
    with pytest.raises(openai.InternalServerError, match="NaN"):
        await front.chat.completions.create(model="m", messages=USER, n=2)
    end = pb.Finished(finish_reason=pb.FINISH_REASON_ERROR, error=error)
    server.events = lambda _: iter([started(), pb.StreamEvent(finished=end)])
    stream = await front.chat.completions.create(model="m", messages=USER, stream=True)
    with pytest.raises(openai.APIError, match="NaN"):
        _ = [chunk async for chunk in stream]


# Leaving.


@pytest.mark.parametrize("prompts", [["a"], ["a", "b"]])
async def test_hanging_up_cancels_a_stream(
    server: ScriptedServer,
    front: openai.AsyncOpenAI,
    caplog: pytest.LogCaptureFixture,
    prompts: list[str],
) -> None:
    server.events = endless
    stream = await front.completions.create(model="m", prompt=prompts, stream=True)
    async for _ in stream:
        break
    await stream.close()
    assert await asyncio.to_thread(server.all_ended.wait, PATIENCE)
    gc.collect()
    assert caplog.records == []


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up_before_the_first_token_cancels(
    server: ScriptedServer, front: openai.AsyncOpenAI, stream: bool
) -> None:
    def silent(context: grpc.ServicerContext) -> Iterator[pb.StreamEvent]:
        server.call_ended.wait(PATIENCE)
        yield started()

    server.events = silent
    body = {"model": "m", "messages": USER, "stream": stream}
    call = asyncio.create_task(post(front, "/chat/completions", body))
    while not server.calls:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    call.cancel()
    assert await asyncio.to_thread(server.call_ended.wait, PATIENCE / 2)
