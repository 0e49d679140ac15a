"""Reasoning and tool calls as typed fields, whole and streamed, over gRPC."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tokenizers import Tokenizer as Backend

from mili.hub.folder import ModelFolder, read_model_folder
from mili.router.ledger import Ledger
from mili.router.meters import Meters
from mili.router.outcome import Usage
from mili.router.params import GenerationParams
from mili.router.parsers.formats import read_formats
from mili.router.request import Request
from mili.router.siblings import Siblings
from mili.router.texts import Texts
from mili.router.tokenizer import Tokenizer
from mili.v1 import inference_pb2 as pb
from mili.v1.inference_pb2_grpc import InferenceServiceStub
from mili.v1.model_pb2 import GetModelRequest
from mili.v1.model_pb2_grpc import ModelServiceStub
from tests.fake_engine import EOS_TOKEN_ID, FakeEngine, make_folder, running_api

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{# <tool_call> #}"
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
TEXT = f"<think>\nhm\n</think>\n\nWell.\n{CALL}\n{CALL}"


def thinking_folder(path: Path) -> ModelFolder:
    make_folder(path)
    backend = Backend.from_file(str(path / "tokenizer.json"))
    backend.add_tokens(list(TAGS))
    backend.add_special_tokens(["<|other|>"])
    backend.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return read_model_folder(path)


class Actor(NamedTuple):
    """A served model that says what the test wants."""

    stub: InferenceServiceStub
    engine: FakeEngine
    tokenizer: Tokenizer
    texts: Texts

    async def say(self, request_id: str, tokens: list[int]) -> Usage:
        """Generate these tokens for a request that was submitted."""
        params = self.engine.params[request_id]
        request, ledger = self._request(request_id, params), Ledger(Meters(), Siblings())
        ledger.open(request)
        request.worker = "w"
        self.engine.deliver(ledger.started([request], 0.0))
        for token in tokens:
            request.accept(token)
            self.engine.deliver([ledger.output(request, token, 0.0)])
            await asyncio.sleep(0)
            if request.finish:
                del self.engine.lengths[request_id]
                break
        return request.usage

    def _request(self, request_id: str, params: GenerationParams) -> Request:
        text = self.texts.make(params)
        return Request(request_id, params, context_limit=4096, text=text)

    def spell(self, text: str, *, tags: bool) -> list[int]:
        """Tokens of a text; without tags, every byte of them is one."""
        encode = self.tokenizer.encode
        if tags:
            return encode(text, add_special_tokens=False)
        pieces = ("".join(pair) for pair in itertools.zip_longest(text, "", fillvalue=""))
        return [token for piece in pieces for token in encode(piece, add_special_tokens=False)]


@pytest.fixture
async def actor(tmp_path: Path) -> AsyncIterator[Actor]:
    async with acting(thinking_folder(tmp_path / "m")) as served:
        yield served


@asynccontextmanager
async def acting(folder: ModelFolder) -> AsyncIterator[Actor]:
    async with running_api(folder) as (server, engine):
        engine.context_limit = 4096
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.public_port}") as channel:
            tokenizer = Tokenizer(folder)
            formats = read_formats(folder.chat_template, tokenizer)
            texts = Texts(tokenizer, formats, folder.generation.eos_token_ids)
            yield Actor(InferenceServiceStub(channel), engine, tokenizer, texts)


def generation(prompt: str = "Hi", **output: bool) -> pb.Generation:
    return pb.Generation(text=prompt, output=pb.OutputOptions(**output))


@pytest.mark.parametrize("tags", [True, False])
async def test_whole_and_streamed_say_the_same(actor: Actor, tags: bool) -> None:
    asked = generation(parse_reasoning=True, parse_tool_calls=True)
    tokens = [*actor.spell(TEXT, tags=tags), EOS_TOKEN_ID]

    whole = asyncio.ensure_future(actor.stub.Generate(pb.GenerateRequest(generation=asked)))
    usage = await actor.say(await actor.engine.submitted.get(), tokens)
    sequence = (await whole).sequences[0]
    assert (sequence.text, sequence.reasoning_text) == ("Well.", "hm")
    calls = [(call.name, call.arguments_json) for call in sequence.tool_calls]
    assert calls == [("f", '{"a": "é"}')] * 2
    assert len({call.id for call in sequence.tool_calls}) == 2
    assert sequence.finish_reason == pb.FINISH_REASON_TOOL_CALLS
    assert (await whole).usage.reasoning_tokens == usage.reasoning_tokens
    assert usage.reasoning_tokens == len("\nhm\n") + (1 if tags else len("</think>"))

    stream = actor.stub.GenerateStream(pb.GenerateStreamRequest(generation=asked))
    saying = asyncio.create_task(actor.say(await actor.engine.submitted.get(), tokens))
    told = pb.GeneratedSequence()
    num_tokens = 0
    async for response in stream:
        delta = response.event.delta
        told.text += delta.text
        told.reasoning_text += delta.reasoning_text
        num_tokens += delta.num_tokens
        for part in delta.tool_calls:
            if part.position == len(told.tool_calls):
                told.tool_calls.add(id=part.id, name=part.name)
            else:
                assert not (part.id or part.name), "they come with the first fragment"
            told.tool_calls[part.position].arguments_json += part.arguments_json_fragment
        last = response.event
    await saying
    assert last.finished.finish_reason == pb.FINISH_REASON_TOOL_CALLS
    assert last.finished.usage.reasoning_tokens == usage.reasoning_tokens
    assert num_tokens == len(tokens)
    assert [(c.name, c.arguments_json) for c in told.tool_calls] == calls
    assert len({call.id for call in told.tool_calls if call.id}) == 2
    assert (told.text, told.reasoning_text) == ("Well.", "hm")


async def told(
    actor: Actor, asked: pb.Generation, text: str, *more: int
) -> tuple[pb.GeneratedSequence, pb.Usage]:
    call = asyncio.ensure_future(actor.stub.Generate(pb.GenerateRequest(generation=asked)))
    request_id = await actor.engine.submitted.get()
    await actor.say(request_id, [*actor.spell(text, tags=True), *more])
    response = await call
    return response.sequences[0], response.usage


async def test_who_does_not_ask_gets_the_text_as_it_is(actor: Actor) -> None:
    sequence, usage = await told(actor, generation(), TEXT, EOS_TOKEN_ID)
    assert sequence.text == TEXT and not sequence.tool_calls and not sequence.reasoning_text
    assert sequence.finish_reason == pb.FINISH_REASON_EOS and not usage.reasoning_tokens


async def test_calls_alone(actor: Actor) -> None:
    asked = generation(parse_tool_calls=True)
    sequence, _ = await told(actor, asked, TEXT, EOS_TOKEN_ID)
    assert sequence.text == "<think>\nhm\n</think>\n\nWell." and len(sequence.tool_calls) == 2
    sequence, _ = await told(actor, asked, "<tool_call>\nno", EOS_TOKEN_ID)
    assert sequence.text == "<tool_call>\nno"
    assert sequence.finish_reason == pb.FINISH_REASON_EOS


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [("Hi<think>\n", True), ("Hi<think>\n\n</think>\n\n", False), ("<think><|im_end|>Hi", False)],
)
async def test_a_prompt_may_open_the_block(actor: Actor, prompt: str, opened: bool) -> None:
    assert actor.tokenizer.token_id("<|im_end|>") == EOS_TOKEN_ID
    asked = generation(prompt, parse_reasoning=True)
    sequence, usage = await told(actor, asked, "hm</think>Yes", EOS_TOKEN_ID)
    expected = ("Yes", "hm", 3) if opened else ("hm</think>Yes", "", 0)
    assert (sequence.text, sequence.reasoning_text, usage.reasoning_tokens) == expected


async def test_stops_are_found_in_the_raw_text(actor: Actor) -> None:
    asked = generation(parse_reasoning=True, parse_tool_calls=True)
    asked.stopping.stop_sequences.append("</think>\n\nW")
    sequence, _ = await told(actor, asked, TEXT)
    assert (sequence.text, sequence.reasoning_text) == ("", "hm\n")
    assert sequence.stop_sequence == "</think>\n\nW"


async def test_max_tokens_cuts_a_call(actor: Actor) -> None:
    asked = generation(parse_tool_calls=True)
    asked.stopping.max_tokens = 30
    sequence, _ = await told(actor, asked, CALL)
    assert sequence.finish_reason == pb.FINISH_REASON_MAX_TOKENS
    assert sequence.tool_calls[0].name == "f"
    assert '{"a": "é"}'.startswith(sequence.tool_calls[0].arguments_json)


async def test_a_block_is_closed_after_so_many_tokens(actor: Actor) -> None:
    asked = generation(parse_reasoning=True, token_ids=True)
    asked.stopping.max_reasoning_tokens = 3
    sequence, usage = await told(actor, asked, "<think>abcdef", EOS_TOKEN_ID)
    assert (sequence.text, sequence.reasoning_text) == ("def", "abc")
    expected = actor.spell("<think>abc\n</think>\n\ndef", tags=True)
    assert list(sequence.token_ids) == [*expected, EOS_TOKEN_ID]
    assert usage.completion_tokens == len(sequence.token_ids)
    assert usage.reasoning_tokens == 3 + 2
    asked.stopping.max_reasoning_tokens = 30
    sequence, _ = await told(actor, asked, "<think>abc</think>def", EOS_TOKEN_ID)
    assert (sequence.text, sequence.reasoning_text) == ("def", "abc")


async def test_a_stop_may_be_in_what_closes_a_block(actor: Actor) -> None:
    asked = generation(token_ids=True)
    asked.stopping.max_reasoning_tokens = 1
    asked.stopping.stop_sequences.append("</think>")
    sequence, usage = await told(actor, asked, "<think>abc")
    assert sequence.text == "<think>a\n" and sequence.stop_sequence == "</think>"
    assert usage.completion_tokens == len(sequence.token_ids) == 4


async def test_what_a_model_has_no_form_of_is_refused(tmp_path: Path) -> None:
    async with acting(make_folder(tmp_path / "m")) as actor:
        for name in ("parse_reasoning", "parse_tool_calls"):
            request = pb.GenerateRequest(generation=generation(**{name: True}))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await actor.stub.Generate(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "the model's" in str(caught.value.details())
        bounded, constrained = generation(), generation()
        bounded.stopping.max_reasoning_tokens = 5
        constrained.structured_output.MergeFrom(
            pb.StructuredOutput(regex="a", after_reasoning=True)
        )
        for asked in (bounded, constrained):
            call = actor.stub.Generate(pb.GenerateRequest(generation=asked))
            assert "has no tags" in await call.details()
            status = await rpc_status.aio.from_call(call)
            info = error_details_pb2.ErrorInfo()
            assert status is not None and status.details[0].Unpack(info)
            assert info.reason == "UNSUPPORTED_FIELD"


@pytest.mark.parametrize("constrains", [False, True])
async def test_what_can_be_asked_of_the_model(tmp_path: Path, constrains: bool) -> None:
    async with running_api(thinking_folder(tmp_path / "m")) as (server, engine):
        engine.constrains_outputs = constrains
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.public_port}") as channel:
            model = (await ModelServiceStub(channel).GetModel(GetModelRequest())).model
    always = ["generate", "embed", "score", "chat", "parse_reasoning", "parse_tool_calls"]
    assert sorted(model.capabilities) == sorted(always + ["structured_output"] * constrains)


async def test_parsing_needs_text(actor: Actor) -> None:
    request = pb.GenerateRequest(generation=generation(text=False, parse_reasoning=True))
    with pytest.raises(grpc.aio.AioRpcError, match="needs the text"):
        await actor.stub.Generate(request)


@pytest.mark.parametrize("bounded", [False, True])
async def test_text_that_is_only_searched_is_not_told(actor: Actor, bounded: bool) -> None:
    asked = generation(text=False, token_ids=True)
    asked.stopping.stop_sequences.append("lo")
    if bounded:
        asked.stopping.max_reasoning_tokens = 2
    stream = actor.stub.GenerateStream(pb.GenerateStreamRequest(generation=asked))
    tokens = actor.spell("<think>abc</think>Hello", tags=True)
    saying = asyncio.create_task(actor.say(await actor.engine.submitted.get(), tokens))
    events = [response.event async for response in stream]
    await saying
    text = "".join(event.delta.text + event.delta.reasoning_text for event in events)
    assert (text, events[-1].finished.stop_sequence) == ("", "lo")
    sequence, usage = await told(actor, asked, "<think>abc</think>Hello")
    assert (sequence.text, sequence.stop_sequence) == ("", "lo")
    assert usage.completion_tokens == len(sequence.token_ids)
    assert usage.reasoning_tokens == (4 if bounded else 0)
