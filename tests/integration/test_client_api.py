"""mili.client against a whole server: each kind of answer, as a caller would ask for it."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from mili.client.aio import AsyncClient
from mili.client.errors import InvalidRequest
from mili.client.options import Options, Tool
from mili.client.results import Generation
from mili.client.sync import Client
from tests.model_folders import add_special_tokens, make_model_folder
from tests.serving import STEADY, Served, serving

# What Qwen3's template does with tools, calls and results, in short.
TEMPLATE = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Answer with <tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}
<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking | default(false) %}<think>
{% endif %}{% endif %}"""
LOOK: Tool = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
ARGUMENTS = {"where": "here", "deep": True}
CALL = f"<tool_call>\n{json.dumps({'name': 'look', 'arguments': ARGUMENTS})}\n</tool_call>"
USER: Any = {"role": "user", "content": "Where is it?"}
# A model of random weights calls no tool by itself: it has no choice, once it has reasoned.
CALLING: Options = {
    "messages": [USER],
    "tools": [LOOK],
    "template_variables": {"enable_thinking": True},
    "choices": [CALL],
    "after_reasoning": True,
    "max_reasoning_tokens": 6,
    "parse_reasoning": True,
    "parse_tool_calls": True,
    "seed": 4,
    "temperature": 1.0,
}


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")

    place: Literal["here", "there"]
    sure: bool


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = make_model_folder(tmp_path_factory.mktemp("client") / "tiny")
    add_special_tokens(model, ["<think>", "</think>", "<tool_call>", "</tool_call>"])
    (model / "chat_template.jinja").write_text(TEMPLATE)
    with serving(model, model.parent / "log", **STEADY) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.address, timeout=60) as client:
        yield client


@pytest.fixture
async def aio(served: Served) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(served.address, timeout=60) as client:
        yield client


def comparable(generation: Generation) -> object:
    """Without what differs from call to call: log-probabilities do in their last digits."""
    sequences = [
        sequence._replace(
            logprobs=(), tool_calls=tuple(call._replace(id="") for call in sequence.tool_calls)
        )
        for sequence in generation.sequences
    ]
    usage = generation.usage._replace(cached_prompt_tokens=0)
    return (sequences, usage, generation.seed, generation.model, generation.response_model)


async def every_way(client: Client, aio: AsyncClient, **options: Any) -> Generation:  # noqa: ANN401
    """The result of a call, which is the same with both clients, whole and streamed."""
    result = client.generate(**options)
    stream = client.stream(**options)
    text = "".join(stream)
    aio_stream = aio.stream(**options)
    aio_text = "".join([piece async for piece in aio_stream])
    others = [stream.generation, await aio.generate(**options), aio_stream.generation]
    assert [comparable(each) for each in others] == [comparable(result)] * 3
    assert {text, aio_text} == {result.sequences[0].text}
    return result


async def test_an_instance_of_a_pydantic_model(client: Client, aio: AsyncClient) -> None:
    result = await every_way(client, aio, messages=[USER], response_format=Place, seed=1)
    assert isinstance(result.parsed, Place)
    assert result.finish_reason == "eos"
    cut = client.generate(messages=[USER], response_format=Place, seed=1, max_tokens=5)
    with pytest.raises(ValidationError):
        _ = cut.parsed


async def test_reasoning_and_a_tool_call(client: Client, aio: AsyncClient) -> None:
    result = await every_way(client, aio, **CALLING)
    assert result.finish_reason == "tool_calls"
    assert result.usage.reasoning_tokens > 0
    assert result.reasoning
    assert "tool_call" not in result.text
    (call,) = result.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("look", ARGUMENTS)

    # The call and its result are what the next question is asked with.
    answer: Any = {"role": "assistant", "content": result.text, "tool_calls": result.tool_calls}
    outcome: Any = {"role": "tool", "content": "found", "tool_call_id": call.id}
    rendered = client.render_chat([USER, answer, outcome], tools=[LOOK])
    assert '<tool_call>{"name": "look", "arguments": {"where": "here"' in rendered.text
    assert "<|im_start|>tool\nfound<|im_end|>" in rendered.text
    again = client.generate(messages=[USER, answer, outcome], tools=[LOOK], max_tokens=1)
    assert again.usage.prompt_tokens == len(rendered.token_ids)


async def test_log_probabilities_of_answer_and_prompt(client: Client, aio: AsyncClient) -> None:
    prompt = list(range(97, 117))
    result = await every_way(
        client, aio, prompt=prompt, max_tokens=6, ignore_eos=True, temperature=0, seed=1,
        top_logprobs=3, prompt_top_logprobs=2,
    )  # fmt: skip
    assert [token.token_id for token in result.logprobs] == list(result.token_ids)
    for token in result.logprobs:
        assert token.rank == 1
        assert token.logprob == token.top[0].logprob
        assert [other.rank for other in token.top] == [1, 2, 3]
    assert [token.token_id for token in result.prompt_logprobs] == prompt[1:]
    for token in result.prompt_logprobs:
        assert token.logprob < 0
        assert len(token.top) == 2


async def test_a_score_is_what_the_logprobs_add_up_to(client: Client, aio: AsyncClient) -> None:
    context, continuations = list(range(97, 107)), [[110, 111, 112], [100]]
    scores = client.score(context, continuations)
    assert [s.num_tokens for s in (await aio.score(context, continuations)).scores] == [3, 1]
    for score, continuation in zip(scores.scores, continuations, strict=True):
        whole = client.generate(context + continuation, max_tokens=1, prompt_top_logprobs=0)
        told = [token.logprob for token in whole.prompt_logprobs[-len(continuation) :]]
        assert score.num_tokens == len(continuation)
        assert score.logprob == pytest.approx(math.fsum(told), abs=1e-3)
    greedy = client.generate(context, max_tokens=3, temperature=0, ignore_eos=True).token_ids
    assert client.score(context, [greedy]).scores[0].is_greedy
    assert not all(score.is_greedy for score in scores.scores)


async def test_vectors(client: Client, aio: AsyncClient) -> None:
    inputs = ["one", list(b"another")]
    result = client.embed(inputs)
    assert [math.hypot(*vector) for vector in result.vectors] == pytest.approx([1, 1], abs=1e-3)
    short = await aio.embed(inputs, dimensions=8, normalize=False)
    for vector, start in zip(result.vectors, short.vectors, strict=True):
        ratios = [one / other for one, other in zip(start, vector[:8], strict=True)]
        assert ratios == pytest.approx([ratios[0]] * 8, rel=1e-2)


async def test_several_answers(client: Client, aio: AsyncClient) -> None:
    result = await every_way(
        client, aio, prompt="Once", num_sequences=3, seed=2, temperature=1.0, max_tokens=10
    )
    assert len({sequence.token_ids for sequence in result.sequences}) == 3
    assert result.usage.completion_tokens == sum(len(s.token_ids) for s in result.sequences)


async def test_another_process_goes_on_where_a_stream_was_left(
    client: Client, aio: AsyncClient
) -> None:
    options: Any = {"prompt": "Once", "max_tokens": 60, "ignore_eos": True, "temperature": 0}
    whole = client.generate(**options)
    left = aio.stream(**options, resume_window=30)
    read = []
    async for piece in left:
        read.append(piece)
        if len("".join(read)) > 10:
            break
    left.close()
    rest = "".join(client.attach(left.resume_token, after_sequence=left.last_sequence))
    assert "".join(read) + rest == whole.text


async def test_a_call_is_cancelled_by_its_name(client: Client, aio: AsyncClient) -> None:
    running = aio.stream("Once", max_tokens=900, ignore_eos=True)
    async for _ in running:
        await aio.cancel(running.request_id)
    assert running.finish_reason == "cancelled"
    assert not client.cancel(running.request_id)


def test_texts_and_models(client: Client) -> None:
    (model,) = client.models()
    assert client.model(model.name) == model
    texts = ["aé", "<tool_call>"]
    ids = client.tokenize(texts)
    assert client.detokenize(ids)[0] == texts[0]
    with pytest.raises(InvalidRequest) as refused:
        client.generate("a", top_p=3.0)
    assert refused.value.field == "generation.sampling.top_p"
