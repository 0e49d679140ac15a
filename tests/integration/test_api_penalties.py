"""Penalties, biases and allowed tokens through a real server with a real worker on a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from mili.v1 import inference_pb2 as pb
from mili.v1.inference_pb2_grpc import InferenceServiceStub
from tests.model_folders import EOS_TOKEN_ID, make_model_folder
from tests.serving import STEADY, Served, serving

PROMPT = [*range(40, 60)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("penalties")
    # Few blocks: many requests at once preempt each other.
    environment = {**STEADY, "MILI_NUM_GPU_BLOCKS_OVERRIDE": "40"}
    with serving(make_model_folder(folder / "tiny"), folder / "log", **environment) as served:
        yield served


@pytest.fixture
def stub(served: Served) -> Iterator[InferenceServiceStub]:
    with grpc.insecure_channel(served.address) as channel:
        yield InferenceServiceStub(channel)


def generate(
    stub: InferenceServiceStub, max_tokens: int = 40, min_tokens: int = 0, **sampling: object
) -> pb.GenerateResponse:
    """Greedy unless said otherwise; EOS does not end it."""
    generation = pb.Generation(
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=pb.SamplingParams(**{"temperature": 0, **sampling}),  # type: ignore[arg-type]
        stopping=pb.StopConditions(max_tokens=max_tokens, min_tokens=min_tokens, ignore_eos=True),
        output=pb.OutputOptions(token_ids=True, timing=True),
    )
    return stub.Generate(pb.GenerateRequest(generation=generation), timeout=60)


def tokens(answer: pb.GenerateResponse) -> list[int]:
    (sequence,) = answer.sequences
    return list(sequence.token_ids)


def test_penalties_push_what_was_generated_back(stub: InferenceServiceStub) -> None:
    plain = tokens(generate(stub, 150, presence_penalty=0))
    presence = tokens(generate(stub, 150, presence_penalty=2))
    frequency = tokens(generate(stub, 150, frequency_penalty=2))
    assert presence != plain
    # It grows until the token gives way, however much the model likes it.
    assert max(Counter(frequency).values()) < 20 < max(Counter(plain).values())
    assert plain[0] == presence[0] == frequency[0], "the prompt's tokens count for neither"


def test_a_bias_forces_and_forbids(stub: InferenceServiceStub) -> None:
    plain = tokens(generate(stub))
    assert tokens(generate(stub, logit_bias={7: 100})) == [7] * 40
    forbidden = dict.fromkeys(plain, -100.0)
    assert not set(plain) & set(tokens(generate(stub, logit_bias=forbidden)))


def test_only_allowed_tokens_come(stub: InferenceServiceStub) -> None:
    allowed = [5, 17, 99, 200]
    for options in ({}, {"temperature": 2, "seed": 3}, {"presence_penalty": 2}):
        output = tokens(generate(stub, allowed_token_ids=allowed, **options))
        assert set(output) <= set(allowed), options
    assert set(tokens(generate(stub, allowed_token_ids=allowed, temperature=9))) == set(allowed)


def test_min_tokens_with_allowed_tokens(stub: InferenceServiceStub) -> None:
    generation = pb.Generation(
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=pb.SamplingParams(
            temperature=0, allowed_token_ids=[EOS_TOKEN_ID, 9], logit_bias={EOS_TOKEN_ID: 100}
        ),
        stopping=pb.StopConditions(max_tokens=30, min_tokens=12),
        output=pb.OutputOptions(token_ids=True),
    )
    answer = stub.Generate(pb.GenerateRequest(generation=generation), timeout=60)
    assert tokens(answer) == [9] * 12 + [EOS_TOKEN_ID]
    del generation.sampling.allowed_token_ids[1]
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(pb.GenerateRequest(generation=generation), timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "min_tokens" in caught.value.details()


def test_the_same_seed_gives_the_same_text_in_any_company(stub: InferenceServiceStub) -> None:
    """Many at once, more than the cache holds: some are preempted, and admitted again."""
    options = {
        "temperature": 1,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.1,
        "logit_bias": {3: 2.0, 100: -5.0},
    }
    alone = [tokens(generate(stub, 80, seed=seed, **options)) for seed in range(4)]
    with ThreadPoolExecutor(24) as pool:
        calls = [pool.submit(generate, stub, 80, seed=seed % 4, **options) for seed in range(24)]
        answers = [call.result() for call in calls]
    for seed, answer in enumerate(answers):
        assert tokens(answer) == alone[seed % 4]
    assert sum(answer.timing.preemptions for answer in answers) > 0, "nobody was preempted"
