"""What a caller may ask for, over gRPC from a real worker: each option does what it says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tokenizers import Tokenizer, processors

from mili.v1 import inference_pb2 as pb
from mili.v1.inference_pb2_grpc import InferenceServiceStub
from mili.v1.model_pb2 import GetModelRequest, TokenizeRequest
from mili.v1.model_pb2_grpc import ModelServiceStub, TokenizerServiceStub
from tests.model_folders import make_model_folder
from tests.serving import STEADY, Served, serving

BOS, START = 256, 257  # <|endoftext|> and <|im_start|>
LETTERS = range(ord("a") - ord("!"), ord("z") - ord("!") + 1)
PROMPT = range(40, 60)
_fresh = itertools.count(1)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("options")
    model = make_model_folder(path / "tiny", max_position_embeddings=8192)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", BOS)]
    )
    tokenizer.save(str(model / "tokenizer.json"))
    with serving(model, path / "log", **STEADY, MILI_MAX_NUM_SEQS="2") as running:
        yield running


@pytest.fixture
def channel(served: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> InferenceServiceStub:
    return InferenceServiceStub(channel)


def asking(
    prompt: Sequence[int] = PROMPT, max_tokens: int = 30, **sampling: object
) -> pb.Generation:
    """At a temperature at which every token may come, unless said otherwise; without an end."""
    generation = pb.Generation(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParams(**{"temperature": 5, "seed": 3, **sampling}),  # type: ignore[arg-type]
        output=pb.OutputOptions(token_ids=True),
    )
    generation.stopping.MergeFrom(pb.StopConditions(max_tokens=max_tokens, ignore_eos=True))
    return generation


def generate(stub: InferenceServiceStub, generation: pb.Generation) -> pb.GenerateResponse:
    return stub.Generate(pb.GenerateRequest(generation=generation), timeout=60)


def tokens(stub: InferenceServiceStub, **sampling: object) -> list[int]:
    return list(generate(stub, asking(**sampling)).sequences[0].token_ids)  # type: ignore[arg-type]


def test_a_temperature_spreads(stub: InferenceServiceStub) -> None:
    greedy = tokens(stub, temperature=0)
    assert greedy == tokens(stub, temperature=0, seed=4)
    outputs = {temperature: tokens(stub, temperature=temperature) for temperature in (0.5, 5, 100)}
    assert greedy != outputs[5] == tokens(stub) != tokens(stub, seed=4)
    numbers = [len(set(output)) for output in (greedy, outputs[5], outputs[100])]
    assert numbers == sorted(numbers) and len({*map(tuple, outputs.values())}) == 3


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_the_likeliest_alone_is_greedy(
    stub: InferenceServiceStub, narrow: dict[str, float]
) -> None:
    assert tokens(stub, **narrow) == tokens(stub, temperature=0) != tokens(stub)


@pytest.mark.parametrize("wide", [{"top_k": 0}, {"top_k": 2**31}, {"top_p": 1.0}, {"min_p": 0.0}])
def test_all_of_them_is_as_if_nothing_was_said(
    stub: InferenceServiceStub, wide: dict[str, float]
) -> None:
    assert tokens(stub, **wide) == tokens(stub)


@pytest.mark.parametrize("some", [{"top_k": 3}, {"top_k": 20, "top_p": 0.5}, {"min_p": 0.3}])
def test_some_of_them(stub: InferenceServiceStub, some: dict[str, float]) -> None:
    """Each token is one of those that are left, by the alternatives that are told beside it."""
    asked = asking(**some)  # type: ignore[arg-type]
    asked.output.top_logprobs = 20
    told = generate(stub, asked).sequences[0].logprobs.tokens
    assert len({token.rank for token in told}) > 1, "more than one is left"
    for token in told:
        # At the temperature of the request; the first is as likely as 1.
        shares = [math.exp((each.logprob - token.top[0].logprob) / 5) for each in token.top]
        sums = [*itertools.accumulate(shares)]
        left = {
            "top_k": int(some.get("top_k", 320)),
            "top_p": 1 + sum(each < some.get("top_p", 1) * sums[-1] * 1.001 for each in sums),
            "min_p": sum(each >= some.get("min_p", 0) * 0.999 for each in shares),
        }
        assert token.rank <= min(left.values())


def test_a_repetition_penalty_lets_nothing_come_twice(stub: InferenceServiceStub) -> None:
    plain = tokens(stub, temperature=0)
    assert len(set(plain)) < len(plain) or set(plain) & set(PROMPT)
    penalized = tokens(stub, temperature=0, repetition_penalty=100)
    assert len(set(penalized)) == len(penalized) and not set(penalized) & set(PROMPT)
    assert tokens(stub, temperature=0, repetition_penalty=1) == plain


def test_a_stop_token_ends_the_output(stub: InferenceServiceStub) -> None:
    plain = tokens(stub)
    stop = plain[10]
    asked = asking()
    asked.stopping.stop_token_ids.extend([319, stop])
    sequence = generate(stub, asked).sequences[0]
    assert list(sequence.token_ids) == plain[: plain.index(stop) + 1]
    assert sequence.finish_reason == pb.FINISH_REASON_STOP_TOKEN
    assert sequence.stop_token_id == stop


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_sequence_is_in_the_text_if_asked_for(
    stub: InferenceServiceStub, include: bool
) -> None:
    asked = asking(allowed_token_ids=LETTERS)  # type: ignore[arg-type]
    text = generate(stub, asked).sequences[0].text
    stop = text[7:9]
    asked.stopping.stop_sequences.append(stop)
    asked.stopping.include_stop_text = include
    sequence = generate(stub, asked).sequences[0]
    assert sequence.text == text.partition(stop)[0] + stop * include
    assert (sequence.finish_reason, sequence.stop_sequence) == (
        pb.FINISH_REASON_STOP_SEQUENCE,
        stop,
    )


def test_special_tokens_are_told_if_asked_for(stub: InferenceServiceStub) -> None:
    asked = asking(max_tokens=3, logit_bias={START: 100}, temperature=0)
    assert generate(stub, asked).sequences[0].text == ""
    asked.output.skip_special_tokens = False
    assert generate(stub, asked).sequences[0].text == "<|im_start|>" * 3


def test_special_tokens_are_added_to_a_text(
    stub: InferenceServiceStub, channel: grpc.Channel
) -> None:
    tokenizer = TokenizerServiceStub(channel)
    ids = {}
    for add in (None, True, False):
        request = TokenizeRequest(texts=["Hi"], add_special_tokens=add)
        ids[add] = list(tokenizer.Tokenize(request).results[0].ids)
        generation = asking(max_tokens=8, temperature=0)
        generation.text = "Hi"
        if add is not None:
            generation.add_special_tokens = add
        told, expected = (
            generate(stub, generation),
            generate(stub, asking(ids[add], 8, temperature=0)),
        )
        assert told.sequences == expected.sequences
        assert told.usage.prompt_tokens == len(ids[add])
    assert ids[None] == ids[True] == [BOS, *ids[False]]


def fresh_prompt() -> list[int]:
    """Four blocks that no other test has asked for."""
    return [20 + next(_fresh), *range(100, 163)]


def cached(stub: InferenceServiceStub, prompt: list[int], **cache: bool) -> int:
    """Prompt tokens that came from the cache."""
    asked = asking(prompt, 2)
    asked.cache.MergeFrom(pb.CacheOptions(**cache))
    return generate(stub, asked).usage.cached_prompt_tokens


def test_the_cache_may_be_bypassed(stub: InferenceServiceStub) -> None:
    prompt = fresh_prompt()
    assert [cached(stub, prompt), cached(stub, prompt)] == [0, 48]
    assert cached(stub, prompt, bypass_read=True) == 0
    assert cached(stub, prompt, bypass_write=True) == 48
    prompt = fresh_prompt()
    assert [cached(stub, prompt, bypass_write=True), cached(stub, prompt)] == [0, 0]
    assert cached(stub, prompt) == 48


def test_a_session_changes_no_token(stub: InferenceServiceStub) -> None:
    asked = asking()
    expected = generate(stub, asked).sequences
    asked.scheduling.session_id = "a session"
    assert all(generate(stub, asked).sequences == expected for _ in range(2))


def test_what_there_is_when_the_time_is_over(stub: InferenceServiceStub) -> None:
    asked = asking(max_tokens=8000)
    asked.stopping.time_limit.FromMilliseconds(700)
    response = generate(stub, asked)
    (sequence,) = response.sequences
    assert sequence.finish_reason == pb.FINISH_REASON_TIME_LIMIT
    assert 0 < len(sequence.token_ids) == response.usage.completion_tokens < 8000


def test_who_may_not_wait_is_refused(stub: InferenceServiceStub) -> None:
    """Two run at once, and the third has no time."""
    long = asking(max_tokens=8000)
    long.stopping.time_limit.FromSeconds(3)
    hasty = asking(max_tokens=1)
    hasty.scheduling.max_queue_time.FromMilliseconds(50)
    with ThreadPoolExecutor(2) as pool:
        streams = [stub.GenerateStream(pb.GenerateStreamRequest(generation=long)) for _ in range(2)]
        for _ in pool.map(next, streams):
            pass
        with pytest.raises(grpc.RpcError) as caught:
            generate(stub, hasty)
        for stream in streams:
            stream.cancel()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(caught.value)
    info = error_details_pb2.ErrorInfo()
    assert status is not None and status.details[0].Unpack(info)
    assert info.reason == "QUEUE_TIMEOUT"
    assert len(generate(stub, asking(max_tokens=1)).sequences) == 1


def test_what_the_worker_can_do_is_announced(channel: grpc.Channel) -> None:
    model = ModelServiceStub(channel).GetModel(GetModelRequest()).model
    assert list(model.capabilities) == ["generate", "embed", "score", "chat", "structured_output"]
