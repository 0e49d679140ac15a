"""Structured output, over gRPC from real processes: what comes out fits what was asked for."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import jsonschema
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from mili.hub.pull import pull
from mili.v1 import inference_pb2 as pb
from mili.v1.inference_pb2_grpc import InferenceServiceStub
from tests.model_folders import add_special_tokens, make_model_folder
from tests.serving import STEADY, Served, serving
from tests.structured import random_schema, request

EOS = pb.FINISH_REASON_EOS
THINK, CLOSE = 259, 260
Api = InferenceServiceStub


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("structured")
    model = make_model_folder(path / "model", max_position_embeddings=4096)
    assert add_special_tokens(model, ["<think>", "</think>"]) == [THINK, CLOSE]
    with serving(model, path / "log", **STEADY) as running:
        yield running


@pytest_asyncio.fixture
async def api(served: Served) -> AsyncIterator[Api]:
    async with grpc.aio.insecure_channel(served.address) as channel:
        yield InferenceServiceStub(channel)


async def generate(api: Api, structured: pb.StructuredOutput, **fields: object) -> str:
    """The text of an output that the grammar ended."""
    response = await api.Generate(request(structured, **fields), timeout=300)  # type: ignore[arg-type]
    sequence = response.sequences[0]
    assert sequence.finish_reason == EOS, (sequence, structured)
    return sequence.text


async def check_schemas(api: Api, seeds: range) -> None:
    """At once: no more than 64 grammars wait to be checked."""

    async def check(seed: int) -> None:
        schema = random_schema(random.Random(seed))
        structured = pb.StructuredOutput(json_schema=json.dumps(schema))
        text = await generate(api, structured, seed=seed)
        jsonschema.validate(json.loads(text), schema)

    await asyncio.gather(*map(check, seeds))


async def test_outputs_of_random_schemas_parse_and_validate(api: Api) -> None:
    await check_schemas(api, range(40))


@pytest.mark.slow
@pytest.mark.timeout(900)  # 190 s with two cores to itself
async def test_500_random_schemas_on_the_demo_model(tmp_path: Path) -> None:
    patient = {"MILI_MAX_QUEUE_TIME": "300"}
    with serving(pull("smollm2-135m"), tmp_path / "log", **patient) as served:
        async with grpc.aio.insecure_channel(served.address) as channel:
            for first in range(0, 500, 50):
                await check_schemas(InferenceServiceStub(channel), range(first, first + 50))


async def test_numbers(api: Api) -> None:
    """They may have any number of digits, so that random weights do not always end one."""
    schema = {"type": "array", "items": {"type": "number", "minimum": -7, "maximum": 2.5}}
    structured = pb.StructuredOutput(json_schema=json.dumps({**schema, "maxItems": 3}))
    stopping = pb.StopConditions(max_tokens=80)
    asked = [request(structured, seed=seed, stopping=stopping) for seed in range(32)]
    responses = await asyncio.gather(*map(api.Generate, asked))
    texts = [each.sequences[0].text for each in responses if each.sequences[0].finish_reason == EOS]
    assert any("." in text for text in texts)
    for text in texts:
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("seed", range(3))
async def test_a_regex(api: Api, seed: int) -> None:
    pattern = r"(\d{1,3}\.){3}\d{1,3} [a-zä]{2,5}"
    text = await generate(api, pb.StructuredOutput(regex=pattern), seed=seed)
    assert re.fullmatch(pattern, text)


async def test_a_grammar(api: Api) -> None:
    grammar = r"""
        start: term ("+" term){1,3}
        term: NUMBER | "(" NUMBER "*" NUMBER ")"
        NUMBER: /[0-9]{1,2}/
    """
    text = await generate(api, pb.StructuredOutput(grammar=grammar), seed=5)
    term = r"(\d{1,2}|\(\d{1,2}\*\d{1,2}\))"
    assert re.fullmatch(rf"{term}(\+{term}){{1,3}}", text)


async def test_choices(api: Api) -> None:
    values = ["yes", "no", 'say "maybe"', "größer\n", "\\d"]
    structured = pb.StructuredOutput(choices=pb.Choices(values=values))
    texts = {await generate(api, structured, seed=seed) for seed in range(12)}
    assert texts <= set(values) and len(texts) > 1


async def test_any_json_object(api: Api) -> None:
    """Its strings may be of any length, so that random weights hardly ever end one."""
    structured = pb.StructuredOutput(json_object=pb.JsonObject())
    stopping = pb.StopConditions(max_tokens=60)
    asked = [request(structured, seed=seed, stopping=stopping) for seed in range(32)]
    responses = await asyncio.gather(*map(api.Generate, asked))
    texts = [each.sequences[0].text for each in responses if each.sequences[0].finish_reason == EOS]
    assert texts and all(isinstance(json.loads(text), dict) for text in texts)
    assert all(each.sequences[0].text.startswith("{") for each in responses)


async def test_a_greedy_output_fits_too_and_the_same_call_gives_the_same(api: Api) -> None:
    structured = pb.StructuredOutput(regex="[a-c]{5}|x[0-9]{3}")
    texts = {await generate(api, structured, temperature=0.0) for _ in range(2)}
    assert len(texts) == 1 and re.fullmatch("[a-c]{5}|x[0-9]{3}", texts.pop())


async def test_max_tokens_may_cut_an_output(api: Api) -> None:
    structured = pb.StructuredOutput(regex="a{100}")
    stopping = pb.StopConditions(max_tokens=10)
    response = await api.Generate(request(structured, stopping=stopping))
    assert response.sequences[0].text == "a" * 10
    assert response.sequences[0].finish_reason == pb.FINISH_REASON_MAX_TOKENS


def thinking(structured: pb.StructuredOutput, *prompt: int, seed: int = 3) -> pb.GenerateRequest:
    asked = request(structured, seed=seed)
    asked.generation.token_ids.ids.extend(prompt)
    asked.generation.structured_output.after_reasoning = True
    return asked


FORMS = {
    "regex": (pb.StructuredOutput(regex="[0-9]{3}"), "[0-9]{3}"),
    "choices": (pb.StructuredOutput(choices=pb.Choices(values=["yes", "no"])), "yes|no"),
    "json_schema": (pb.StructuredOutput(json_schema='{"type": "boolean"}'), r"\s*(true|false)\s*"),
}


@pytest.mark.parametrize("form", FORMS)
async def test_reasoning_comes_first(api: Api, form: str) -> None:
    """Closed after so many tokens as models close it: the answer is behind an empty line."""
    structured, pattern = FORMS[form]
    asked = thinking(structured, THINK)
    asked.generation.stopping.max_reasoning_tokens = 9
    raw = (await api.Generate(asked)).sequences[0]
    assert raw.finish_reason == EOS
    assert re.fullmatch(rf"(?s:.+)\n</think>\n\n({pattern})", raw.text)
    asked.generation.output.parse_reasoning = True
    told = await api.Generate(asked)
    parsed = told.sequences[0]
    assert parsed.reasoning_text and re.fullmatch(pattern, parsed.text)
    assert told.usage.reasoning_tokens == 9 + 2


async def test_the_model_itself_closes_its_reasoning(api: Api) -> None:
    structured, pattern = FORMS["regex"]
    asked = thinking(structured)
    asked.generation.sampling.logit_bias[CLOSE] = 100
    asked.generation.output.skip_special_tokens = False
    sequence = (await api.Generate(asked)).sequences[0]
    assert re.fullmatch(rf"</think>\n{{0,2}}({pattern})", sequence.text)
    assert sequence.finish_reason == EOS


async def test_of_a_prompt_that_has_closed_it_all_of_the_output_fits(api: Api) -> None:
    structured, pattern = FORMS["regex"]
    sequence = (await api.Generate(thinking(structured, THINK, 20, CLOSE, 21))).sequences[0]
    assert re.fullmatch(pattern, sequence.text) and sequence.finish_reason == EOS


async def test_without_reasoning_there_is_no_end_to_force(api: Api) -> None:
    asked = request(pb.StructuredOutput(regex="a"))
    asked.generation.stopping.max_reasoning_tokens = 5
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await api.Generate(asked)
    error = RefusedError(caught.value)
    assert error.reason == "INVALID_FIELD" and "only with after_reasoning" in error.message
    assert error.field == "generation.stopping.max_reasoning_tokens"


async def test_streamed_output_is_the_same_and_its_preparation_is_timed(api: Api) -> None:
    whole = request(pb.StructuredOutput(regex="[0-9]{20}"), output=pb.OutputOptions(timing=True))
    expected = await api.Generate(whole)
    assert expected.timing.grammar_compile.nanos > 0
    text = ""
    async for response in api.GenerateStream(pb.GenerateStreamRequest(generation=whole.generation)):
        text += response.event.delta.text
    assert text == expected.sequences[0].text


async def test_unconstrained_neighbours_are_unchanged(api: Api) -> None:
    free = [request(pb.StructuredOutput(), seed=seed) for seed in range(4)]
    for each in free:
        each.generation.stopping.max_tokens = 60
    alone = [(await api.Generate(each)).sequences for each in free]
    structured = pb.StructuredOutput(json_schema='{"type": "string", "maxLength": 80}')
    neighbours = [generate(api, structured, seed=seed) for seed in range(4)]
    responses = await asyncio.gather(*(api.Generate(each) for each in free), *neighbours)
    assert [each.sequences for each in responses[: len(free)]] == alone


ANY_OF_EIGHT = {
    "anyOf": [
        {"type": "object", "properties": {f"k{index}": {"type": "string"}}} for index in range(8)
    ]
}
BOMBS = {
    "nested repetition": pb.StructuredOutput(regex="((((a{1000}){1000}){1000}){1000}){1000}b"),
    "intersections": pb.StructuredOutput(
        grammar="start: A\nA: /.*a.{30}/ & /.*b.{29}/ & ~/.*c.{28}.*/"
    ),
    "exponential schema": pb.StructuredOutput(
        json_schema=json.dumps({"allOf": [ANY_OF_EIGHT] * 7})
    ),
}


@pytest.mark.parametrize("name", BOMBS)
async def test_a_bomb_is_refused_in_time(api: Api, name: str) -> None:
    started = time.monotonic()
    error = await refusal(api, BOMBS[name])
    assert error.reason == "GRAMMAR_TOO_COMPLEX"
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("structured", "field", "cause"),
    [
        (pb.StructuredOutput(regex="(a"), "regex", "unclosed group"),
        (pb.StructuredOutput(grammar="start: foo"), "grammar", "unknown name"),
        (pb.StructuredOutput(json_schema="{"), "json_schema", "EOF"),
        (pb.StructuredOutput(json_schema='{"type": "strin"}'), "json_schema", "strin"),
        (pb.StructuredOutput(json_schema='{"enum": []}'), "json_schema", "Unsatisfiable"),
        (pb.StructuredOutput(json_schema='{"not": {}}'), "json_schema", "not"),
        (pb.StructuredOutput(regex=r"[^\s\S]"), "regex", "no text fits"),
    ],
)
async def test_a_wrong_grammar_is_refused_by_name_and_cause(
    api: Api, structured: pb.StructuredOutput, field: str, cause: str
) -> None:
    error = await refusal(api, structured)
    assert error.reason == "GRAMMAR_INVALID"
    assert error.field == f"generation.structured_output.{field}"
    assert cause in error.message


class RefusedError(Exception):
    """What a caller is told of a call that was refused."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
        assert status is not None
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        status.details[0].Unpack(info)
        status.details[1].Unpack(bad)
        self.reason, self.message = info.reason, status.message
        self.field = bad.field_violations[0].field


async def refusal(api: Api, structured: pb.StructuredOutput) -> RefusedError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await api.Generate(request(structured))
    return RefusedError(caught.value)
