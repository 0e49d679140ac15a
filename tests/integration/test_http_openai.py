"""The official openai package against a whole server: what generation can do, through HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from tokenizers import Tokenizer

from tests.model_folders import make_model_folder
from tests.serving import STEADY, Served, free_port, serving

MESSAGES: Any = [{"role": "user", "content": "Where is it?"}]
SCHEMA = {
    "type": "object",
    "properties": {"place": {"enum": ["here", "there"]}, "sure": {"type": "boolean"}},
    "required": ["place", "sure"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("openai") / "tiny")


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with serving(model, model.parent / "log", "--http-port", str(free_port()), **STEADY) as served:
        yield served


@pytest.fixture
async def client(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    base = f"http://{served.http}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key="x", max_retries=0) as client:
        yield client


async def test_an_answer_of_a_schema(client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": MESSAGES, "response_format": FORMAT, "seed": 3}
    whole = await client.chat.completions.create(**asked)
    content = whole.choices[0].message.content
    assert content is not None
    jsonschema.validate(json.loads(content), SCHEMA)
    assert whole.choices[0].finish_reason == "stop"

    stream = await client.chat.completions.create(**asked, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == content


async def test_any_json_object(client: openai.AsyncOpenAI) -> None:
    completion = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, seed=1, max_tokens=400, temperature=1,
        response_format={"type": "json_object"},
    )  # fmt: skip
    (choice,) = completion.choices
    assert choice.message.content is not None
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


async def test_a_schema_that_is_none(client: openai.AsyncOpenAI) -> None:
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=wrong)
    assert refused.value.code == "GRAMMAR_INVALID"


async def test_several_answers_with_log_probabilities(client: openai.AsyncOpenAI) -> None:
    completion = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, n=3, seed=5, temperature=1, max_tokens=12,
        logprobs=True, top_logprobs=2, extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in completion.choices}) > 1
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 36
    for choice in completion.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 12
        for token in choice.logprobs.content:
            first, second = token.top_logprobs
            assert first.logprob >= second.logprob
            assert first.logprob >= token.logprob


async def test_penalties_and_biases_are_felt(client: openai.AsyncOpenAI, model: Path) -> None:
    async def text(**options: Any) -> str:  # noqa: ANN401
        completion = await client.completions.create(
            model="tiny", prompt="ab", max_tokens=24, temperature=0,
            extra_body={"ignore_eos": True}, **options,
        )  # fmt: skip
        return completion.choices[0].text

    plain = await text()
    assert await text() == plain
    assert await text(presence_penalty=2.0, frequency_penalty=2.0) != plain
    (letter,) = Tokenizer.from_file(str(model / "tokenizer.json")).encode("a").ids
    assert await text(logit_bias={str(letter): 100}) == "a" * 24
    stop = plain[3:5]
    assert await text(stop=[stop]) == plain[: plain.index(stop)]


async def test_tools_that_the_template_would_drop(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model="tiny", messages=MESSAGES, tools=[TOOL])
    assert refused.value.code == "UNSUPPORTED_FIELD"


async def test_embeddings(client: openai.AsyncOpenAI) -> None:
    texts = ["one", "another"]
    plain = await client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    packed = await client.embeddings.create(model="tiny", input=texts, dimensions=16)
    for whole, short in zip(plain.data, packed.data, strict=True):
        assert sum(x * x for x in whole.embedding) == pytest.approx(1, abs=1e-3)
        assert len(short.embedding) == 16
        length = sum(x * x for x in whole.embedding[:16]) ** 0.5
        assert short.embedding == pytest.approx(
            [x / length for x in whole.embedding[:16]], abs=1e-3
        )


async def test_errors_have_openais_shape(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.chat.completions.create(model="none", messages=MESSAGES)
    assert unknown.value.code == "MODEL_NOT_FOUND"
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)
    assert refused.value.param == "temperature"
