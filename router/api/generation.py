"""A Generation message as GenerationParams: every value checked, every default filled in.

Owns the rules for the values. Does not know how prompts become tokens, or who runs the request.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import NamedTuple

from mili.hub.folder import ModelFolder
from mili.internal.v1.step_pb2 import Sampling
from mili.router.errors import Reason, RequestError
from mili.router.readings import MAX_ALTERNATIVES
from mili.router.request import GenerationParams, Scheduling
from mili.v1 import inference_pb2 as pb

_MAX_TEMPERATURE = 100.0
# Below it logits divided by the temperature overflow; as in vLLM, such a one means greedy.
_MIN_TEMPERATURE = 1e-5
_MIN_REPETITION_PENALTY = 0.01
_MAX_REPETITION_PENALTY = 100.0
MAX_SEQUENCES = 128
_MAX_STOP_SEQUENCES = 64
_MAX_STOP_SEQUENCE_BYTES = 1024


class Defaults(NamedTuple):
    """What a model uses where the caller says nothing."""

    sampling: pb.SamplingParams
    eos_token_ids: frozenset[int]
    vocab_size: int


def read_defaults(folder: ModelFolder) -> Defaults:
    """Return a model's defaults; raise ValueError where its generation_config.json has bad ones.

    As in vLLM do_sample is ignored: a folder that names a temperature is sampled with it.
    """
    named = folder.generation
    path = folder.path / "generation_config.json"
    sampling = pb.SamplingParams(temperature=1, top_p=1, top_k=0, min_p=0, repetition_penalty=1)
    for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        value = getattr(named, key)
        if value is None:
            continue
        try:
            # A top_k of -1 is another way to say off.
            setattr(sampling, key, max(0, int(value)) if key == "top_k" else value)
        except (OverflowError, ValueError):
            raise ValueError(f"{path}: {key}: {value!r} is out of range") from None
    try:
        _check_sampling(sampling)
    except RequestError as error:
        raise ValueError(f"{path}: {error.field.split('.')[-1]}: {error}") from None
    return Defaults(sampling, frozenset(named.eos_token_ids), folder.vocab_size)


def check_generation(generation: pb.Generation, context_limit: int, defaults: Defaults) -> None:
    """Raise RequestError for a bad value, before any work that grows with the prompt."""
    _check_sampling(generation.sampling)
    _check_stopping(generation.stopping, defaults.vocab_size)
    _check_output(generation.output, defaults.vocab_size)
    kind = generation.WhichOneof("prompt")
    _require(kind is not None, "generation.prompt", "is missing")
    _require(kind != "text" or bool(generation.text), "generation.text", "is empty")
    _require(
        kind == "text" or not generation.add_special_tokens,
        "generation.add_special_tokens",
        "is for text prompts only",
    )
    if generation.HasField("truncate_prompt_tokens"):
        _require(
            generation.truncate_prompt_tokens >= 1,
            "generation.truncate_prompt_tokens",
            "must be at least 1",
        )
    if kind == "token_ids":
        count = len(generation.token_ids.ids)
        if generation.HasField("truncate_prompt_tokens"):
            count = min(count, generation.truncate_prompt_tokens)
        check_length(count, "generation.token_ids", context_limit)


def to_params(
    generation: pb.Generation,
    prompt: list[int],
    context_limit: int,
    defaults: Defaults,
    *,
    cache_namespace: bytes,
    scheduling: Scheduling,
) -> GenerationParams:
    """Return the parameters of a checked Generation; raise RequestError for a bad prompt."""
    field = f"generation.{generation.WhichOneof('prompt')}"
    check_length(len(prompt), field, context_limit)
    check_token_ids(prompt, defaults.vocab_size, field)
    stopping, output = generation.stopping, generation.output
    eos = frozenset() if stopping.ignore_eos else defaults.eos_token_ids
    stop_ids = frozenset(stopping.stop_token_ids)
    # Past the context limit numbers mean no more than the limit does: it ends the request first.
    min_tokens = min(stopping.min_tokens, context_limit)
    max_tokens = context_limit
    if stopping.HasField("max_tokens"):
        max_tokens = min(stopping.max_tokens, context_limit)
    sampling = _sampling(generation.sampling, defaults)
    if min_tokens:
        sampling.suppressed_token_ids.extend(sorted(eos | stop_ids))
        sampling.suppress_until_position = len(prompt) + min_tokens
    return GenerationParams(
        prompt_token_ids=prompt,
        sampling=sampling,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        eos_token_ids=eos,
        stop_token_ids=stop_ids,
        stop_sequences=tuple(stopping.stop_sequences),
        include_stop_text=stopping.include_stop_text,
        text=output.text if output.HasField("text") else True,
        skip_special_tokens=(
            output.skip_special_tokens if output.HasField("skip_special_tokens") else True
        ),
        cache_namespace=cache_namespace,
        cache_read=not generation.cache.bypass_read,
        cache_write=not generation.cache.bypass_write,
        scheduling=scheduling,
        num_sequences=max(1, generation.sampling.num_sequences),
        num_logprobs=output.top_logprobs if output.HasField("top_logprobs") else None,
        num_prompt_logprobs=(
            output.prompt_top_logprobs if output.HasField("prompt_top_logprobs") else None
        ),
    )


def check_length(count: int, field: str, context_limit: int) -> None:
    """Raise RequestError for a prompt without tokens, or of more than fit."""
    _require(count > 0, field, "is empty")
    if count >= context_limit:
        raise RequestError(
            Reason.CONTEXT_TOO_LONG,
            f"the prompt has {count} tokens, and at most {context_limit - 1} fit: prompt and"
            f" output together may have {context_limit}",
            field=field,
        )


def check_token_ids(ids: Sequence[int], vocab_size: int, field: str) -> None:
    """Raise RequestError for an id outside of the vocabulary."""
    _require(
        max(ids, default=0) < vocab_size,
        field,
        f"has an id out of range: the model has {vocab_size} ids",
    )


def _sampling(asked: pb.SamplingParams, defaults: Defaults) -> Sampling:
    merged = pb.SamplingParams()
    merged.CopyFrom(defaults.sampling)
    merged.MergeFrom(asked)
    greedy = merged.temperature < _MIN_TEMPERATURE
    return Sampling(
        temperature=0.0 if greedy else merged.temperature,
        top_k=merged.top_k if merged.top_k < defaults.vocab_size else 0,
        top_p=merged.top_p,
        min_p=merged.min_p,
        repetition_penalty=merged.repetition_penalty,
        seed=merged.seed if merged.HasField("seed") else secrets.randbits(64),
    )


def _check_sampling(asked: pb.SamplingParams) -> None:
    """Check what is set; comparisons are written so that NaN fails them."""
    path = "generation.sampling."
    if asked.HasField("temperature"):
        _require(
            0 <= asked.temperature <= _MAX_TEMPERATURE,
            path + "temperature",
            f"must be from 0 to {_MAX_TEMPERATURE:g}",
        )
    if asked.HasField("top_p"):
        _require(0 < asked.top_p <= 1, path + "top_p", "must be above 0 and at most 1")
    if asked.HasField("min_p"):
        _require(0 <= asked.min_p <= 1, path + "min_p", "must be from 0 to 1")
    if asked.HasField("repetition_penalty"):
        _require(
            _MIN_REPETITION_PENALTY <= asked.repetition_penalty <= _MAX_REPETITION_PENALTY,
            path + "repetition_penalty",
            f"must be from {_MIN_REPETITION_PENALTY:g} to {_MAX_REPETITION_PENALTY:g}",
        )
    if asked.HasField("num_sequences"):
        _require(
            1 <= asked.num_sequences <= MAX_SEQUENCES,
            path + "num_sequences",
            f"must be from 1 to {MAX_SEQUENCES}",
        )


def _check_stopping(asked: pb.StopConditions, vocab_size: int) -> None:
    path = "generation.stopping."
    if asked.HasField("max_tokens"):
        _require(asked.max_tokens >= 1, path + "max_tokens", "must be at least 1")
        _require(
            asked.min_tokens <= asked.max_tokens, path + "min_tokens", "must not pass max_tokens"
        )
    _require(
        len(asked.stop_sequences) <= _MAX_STOP_SEQUENCES,
        path + "stop_sequences",
        f"has {len(asked.stop_sequences)} entries; at most {_MAX_STOP_SEQUENCES} are taken",
    )
    for index, text in enumerate(asked.stop_sequences):
        _require(
            1 <= len(text.encode()) <= _MAX_STOP_SEQUENCE_BYTES,
            f"{path}stop_sequences[{index}]",
            f"must have from 1 to {_MAX_STOP_SEQUENCE_BYTES} bytes",
        )
    field = path + "stop_token_ids"
    _require(len(asked.stop_token_ids) <= vocab_size, field, "has more entries than ids exist")
    check_token_ids(asked.stop_token_ids, vocab_size, field)


def _check_output(asked: pb.OutputOptions, vocab_size: int) -> None:
    most = min(MAX_ALTERNATIVES, vocab_size)
    for name in ("top_logprobs", "prompt_top_logprobs"):
        _require(getattr(asked, name) <= most, f"generation.output.{name}", f"is at most {most}")


def _require(condition: bool, field: str, rule: str) -> None:
    if not condition:
        name = field.rsplit(".", 1)[-1]
        raise RequestError(Reason.INVALID_FIELD, f"{name} {rule}", field=field)
