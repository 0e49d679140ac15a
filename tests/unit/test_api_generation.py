"""Every value of a Generation: its limits, and what stands in where it is not set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mili.kernels import reference_sampling
from mili.router.api.generation import Defaults, check_generation, read_defaults, to_params
from mili.router.api.sampling import MAX_BIASES
from mili.router.errors import Reason, RequestError
from mili.router.introspection import RequestState
from mili.router.outcome import FinishReason
from mili.router.params import GenerationParams, Scheduling
from mili.router.worker_group import WorkerState
from mili.v1 import admin_pb2
from mili.v1 import inference_pb2 as pb
from tests.fake_engine import CONTEXT_LIMIT, EOS_TOKEN_ID, VOCAB_SIZE, make_folder

NAN = float("nan")
INFINITY = float("inf")
PROMPT = [1, 2, 3]


@pytest.fixture
def defaults(tmp_path: Path) -> Defaults:
    return read_defaults(make_folder(tmp_path / "m"))


def text(**fields: object) -> pb.Generation:
    return pb.Generation(text="hi", **fields)  # type: ignore[arg-type]


def params(generation: pb.Generation, defaults: Defaults) -> GenerationParams:
    check_generation(generation, CONTEXT_LIMIT, defaults)
    return params_of(generation, PROMPT, defaults)


def params_of(generation: pb.Generation, prompt: list[int], defaults: Defaults) -> GenerationParams:
    return to_params(
        generation,
        prompt,
        CONTEXT_LIMIT,
        defaults,
        cache_namespace=b"namespace",
        scheduling=Scheduling(tenant="search"),
    )


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("temperature", (NAN, INFINITY, -INFINITY, -0.1, 101)),
        ("top_p", (NAN, 0, -1, 2, INFINITY)),
        ("min_p", (NAN, -0.1, 1.5)),
        ("repetition_penalty", (NAN, 0, -1, INFINITY, 1000)),
        ("presence_penalty", (NAN, -2.1, 2.1, INFINITY)),
        ("frequency_penalty", (NAN, -2.1, 2.1, -INFINITY)),
    ],
)
def test_sampling_limits(defaults: Defaults, field: str, bad: tuple[float, ...]) -> None:
    for value in bad:
        generation = text(sampling=pb.SamplingParams(**{field: value}))
        with pytest.raises(RequestError) as caught:
            check_generation(generation, CONTEXT_LIMIT, defaults)
        assert caught.value.reason is Reason.INVALID_FIELD
        assert caught.value.field == f"generation.sampling.{field}"


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        (pb.SamplingParams(logit_bias={3: NAN}), "logit_bias[3]"),
        (pb.SamplingParams(logit_bias={3: 100, 4: 101}), "logit_bias[4]"),
        (pb.SamplingParams(logit_bias={3: -INFINITY}), "logit_bias[3]"),
        (pb.SamplingParams(logit_bias={VOCAB_SIZE: 1}), "logit_bias"),
        (pb.SamplingParams(logit_bias=dict.fromkeys(range(1025), 1)), "logit_bias"),
        (pb.SamplingParams(allowed_token_ids=[0, VOCAB_SIZE]), "allowed_token_ids"),
        (pb.SamplingParams(allowed_token_ids=[0] * (VOCAB_SIZE + 1)), "allowed_token_ids"),
    ],
)
def test_limits_of_token_lists(defaults: Defaults, sampling: pb.SamplingParams, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_generation(text(sampling=sampling), CONTEXT_LIMIT, defaults)
    assert caught.value.field == f"generation.sampling.{field}"
    assert str(caught.value).startswith(f"{field} ")


def test_penalties_biases_and_allowed_tokens_reach_the_worker(defaults: Defaults) -> None:
    asked = pb.SamplingParams(
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={200: -100, 7: 100, 0: 0.5},
        allowed_token_ids=[VOCAB_SIZE - 1, 0],
    )
    sampling = params(text(sampling=asked), defaults).sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2, 2)
    assert dict(zip(sampling.bias_token_ids, sampling.biases, strict=True)) == asked.logit_bias
    assert list(sampling.bias_token_ids) == [0, 7, 200], "workers search it"
    assert list(sampling.allowed_token_ids) == [VOCAB_SIZE - 1, 0]
    assert MAX_BIASES == reference_sampling.MAX_BIASES


def test_min_tokens_must_leave_a_token(defaults: Defaults) -> None:
    stopping = pb.StopConditions(min_tokens=1, stop_token_ids=[7])
    asked = pb.SamplingParams(allowed_token_ids=[EOS_TOKEN_ID, 7])
    with pytest.raises(RequestError) as caught:
        params(text(sampling=asked, stopping=stopping), defaults)
    assert caught.value.field == "generation.stopping.min_tokens"
    asked.allowed_token_ids.append(8)
    params(text(sampling=asked, stopping=stopping), defaults)
    del asked.allowed_token_ids[2]
    stopping.min_tokens = 0
    params(text(sampling=asked, stopping=stopping), defaults)


@pytest.mark.parametrize(
    ("stopping", "field"),
    [
        (pb.StopConditions(max_tokens=0), "max_tokens"),
        (pb.StopConditions(max_tokens=2, min_tokens=3), "min_tokens"),
        (pb.StopConditions(stop_sequences=["x"] * 65), "stop_sequences"),
        (pb.StopConditions(stop_sequences=["x"] * 1_000_000), "stop_sequences"),
        (pb.StopConditions(stop_sequences=["x", ""]), "stop_sequences[1]"),
        (pb.StopConditions(stop_sequences=["ä" * 513]), "stop_sequences[0]"),
        (pb.StopConditions(stop_token_ids=[VOCAB_SIZE]), "stop_token_ids"),
        (pb.StopConditions(stop_token_ids=[0] * (VOCAB_SIZE + 1)), "stop_token_ids"),
    ],
)
def test_stop_limits(defaults: Defaults, stopping: pb.StopConditions, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_generation(text(stopping=stopping), CONTEXT_LIMIT, defaults)
    assert caught.value.field == f"generation.stopping.{field}"


def test_stop_limits_are_reached_but_not_passed(defaults: Defaults) -> None:
    stopping = pb.StopConditions(
        stop_sequences=["ä" * 512] * 64,
        stop_token_ids=[0, VOCAB_SIZE - 1, 0],
        max_tokens=1,
        min_tokens=1,
    )
    result = params(text(stopping=stopping), defaults)
    assert len(result.stop_sequences) == 64
    assert result.stop_token_ids == {0, VOCAB_SIZE - 1}


@pytest.mark.parametrize(
    ("generation", "field"),
    [
        (pb.Generation(), "generation.prompt"),
        (pb.Generation(text=""), "generation.text"),
        (text(truncate_prompt_tokens=0), "generation.truncate_prompt_tokens"),
        (
            pb.Generation(token_ids=pb.TokenIds(ids=[1]), add_special_tokens=True),
            "generation.add_special_tokens",
        ),
    ],
)
def test_prompt_options(defaults: Defaults, generation: pb.Generation, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_generation(generation, CONTEXT_LIMIT, defaults)
    assert caught.value.field == field


def test_a_prompt_must_leave_room_for_a_token(defaults: Defaults) -> None:
    params_of(text(), [1] * (CONTEXT_LIMIT - 1), defaults)
    with pytest.raises(RequestError, match=r"64 tokens.* 63 fit") as caught:
        params_of(text(), [1] * CONTEXT_LIMIT, defaults)
    assert caught.value.reason is Reason.CONTEXT_TOO_LONG


def test_prompt_ids_are_in_the_vocabulary(defaults: Defaults) -> None:
    with pytest.raises(RequestError, match="out of range"):
        params_of(text(), [0, VOCAB_SIZE], defaults)
    with pytest.raises(RequestError, match="empty"):
        params_of(text(), [], defaults)


def test_nothing_set(defaults: Defaults) -> None:
    first, second = params(text(), defaults), params(text(), defaults)
    assert first.sampling.temperature == 1.0
    assert (first.sampling.top_p, first.sampling.top_k, first.sampling.min_p) == (1.0, 0, 0.0)
    assert first.sampling.repetition_penalty == 1.0
    assert (first.sampling.presence_penalty, first.sampling.frequency_penalty) == (0, 0)
    assert not first.sampling.bias_token_ids and not first.sampling.allowed_token_ids
    assert first.sampling.seed != second.sampling.seed
    # The context ends it, and so says the finish reason.
    assert first.max_tokens == CONTEXT_LIMIT
    assert first.eos_token_ids == {EOS_TOKEN_ID}
    assert first.text
    assert first.skip_special_tokens


def test_the_models_defaults(tmp_path: Path) -> None:
    folder = make_folder(
        tmp_path / "m", temperature=0.5, top_p=0.25, top_k=20, min_p=0.125, do_sample=False,
        presence_penalty=1.5, frequency_penalty=-0.5,
    )  # fmt: skip
    defaults = read_defaults(folder)
    sampling = params(text(), defaults).sampling
    assert (sampling.temperature, sampling.top_p) == (0.5, 0.25)
    assert (sampling.top_k, sampling.min_p) == (20, 0.125)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -0.5)
    asked = pb.SamplingParams(temperature=0, top_k=0, seed=0, presence_penalty=0)
    sampling = params(text(sampling=asked), defaults).sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0, 0, 0)
    assert sampling.top_p == 0.25
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0, -0.5)


def test_a_models_bad_default_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", top_p=7)
    with pytest.raises(ValueError, match=r"generation_config\.json.*top_p"):
        read_defaults(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("top_k", INFINITY), ("top_k", 2**40), ("temperature", 10**400)]
)
def test_a_models_default_that_no_field_holds_is_named(
    tmp_path: Path, key: str, value: float
) -> None:
    folder = make_folder(tmp_path / "m")
    folder = replace(folder, generation=replace(folder.generation, **{key: value}))
    with pytest.raises(ValueError, match=rf"generation_config\.json: {key}: "):
        read_defaults(folder)


def test_top_k_beyond_the_vocabulary_and_tiny_temperatures(defaults: Defaults) -> None:
    asked = pb.SamplingParams(top_k=VOCAB_SIZE, temperature=1e-30)
    sampling = params(text(sampling=asked), defaults).sampling
    assert (sampling.top_k, sampling.temperature) == (0, 0)


def test_min_tokens_suppress_whatever_would_stop(defaults: Defaults) -> None:
    stopping = pb.StopConditions(min_tokens=5, stop_token_ids=[7])
    result = params(text(stopping=stopping), defaults)
    assert list(result.sampling.suppressed_token_ids) == [7, EOS_TOKEN_ID]
    assert result.sampling.suppress_until_position == len(PROMPT) + 5
    stopping.ignore_eos = True
    result = params(text(stopping=stopping), defaults)
    assert list(result.sampling.suppressed_token_ids) == [7]
    assert result.eos_token_ids == frozenset()


def test_numbers_beyond_the_context(defaults: Defaults) -> None:
    most = 2**32 - 1
    stopping = pb.StopConditions(min_tokens=most, max_tokens=most)
    result = params(text(stopping=stopping), defaults)
    assert (result.min_tokens, result.max_tokens) == (CONTEXT_LIMIT, CONTEXT_LIMIT)


def test_numbers_equal_the_protos() -> None:
    for reason in FinishReason:
        assert pb.FinishReason.Name(pb.FinishReason.ValueType(reason)).endswith(reason.name)
    for state in WorkerState:
        assert admin_pb2.WorkerState.Value(f"WORKER_STATE_{state.name}") == state
    for step in RequestState:
        assert admin_pb2.RequestState.Value(f"REQUEST_STATE_{step.name}") == step


def test_the_cache_is_used_unless_bypassed(defaults: Defaults) -> None:
    result = params(text(), defaults)
    assert (result.cache_read, result.cache_write) == (True, True)
    assert (result.cache_namespace, result.scheduling.tenant) == (b"namespace", "search")
    result = params(text(cache=pb.CacheOptions(bypass_read=True)), defaults)
    assert (result.cache_read, result.cache_write) == (False, True)
    result = params(text(cache=pb.CacheOptions(bypass_write=True)), defaults)
    assert (result.cache_read, result.cache_write) == (True, False)
