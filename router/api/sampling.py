"""SamplingParams as the workers' Sampling: every value checked, every default filled in.

Owns the rules for the values. Does not know how anything is drawn: that is the worker's
kernels/reference_sampling.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from mili.hub.folder import ModelFolder
from mili.internal.v1.step_pb2 import Sampling
from mili.router.errors import Reason, RequestError
from mili.v1 import inference_pb2 as pb

# What each number may be; as everywhere, NaN is in no range.
_LIMITS = {
    "temperature": (0.0, 100.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
MAX_SEQUENCES = 128
_MAX_BIAS = 100.0
# What a worker has room for.
MAX_BIASES = 1024
# Below it logits divided by the temperature overflow; as in vLLM, such a one means greedy.
_MIN_TEMPERATURE = 1e-5
_PATH = "generation.sampling."


def read_sampling_defaults(folder: ModelFolder) -> pb.SamplingParams:
    """Return what stands in where a caller says nothing; raise ValueError for what cannot.

    As in vLLM do_sample is ignored: a folder that names a temperature is sampled with it.
    """
    path = folder.path / "generation_config.json"
    sampling = pb.SamplingParams(temperature=1, top_p=1, top_k=0, min_p=0, repetition_penalty=1)
    for key in (*_LIMITS, "top_p", "top_k"):
        value = getattr(folder.generation, key)
        if value is None:
            continue
        try:
            # A top_k of -1 is another way to say off.
            setattr(sampling, key, max(0, int(value)) if key == "top_k" else value)
        except (OverflowError, ValueError):
            raise ValueError(f"{path}: {key}: {value!r} is out of range") from None
    try:
        check_sampling(sampling, folder.vocab_size)
    except RequestError as error:
        raise ValueError(f"{path}: {error.field.split('.')[-1]}: {error}") from None
    return sampling


def check_sampling(asked: pb.SamplingParams, vocab_size: int) -> None:
    """Raise RequestError for the first value that is set and may not be so."""
    for name, (least, most) in _LIMITS.items():
        if asked.HasField(name):  # type: ignore[arg-type]
            rule = f"must be from {least:g} to {most:g}"
            require(least <= getattr(asked, name) <= most, _PATH + name, rule)
    if asked.HasField("top_p"):
        require(0 < asked.top_p <= 1, _PATH + "top_p", "must be above 0 and at most 1")
    if asked.HasField("num_sequences"):
        rule = f"must be from 1 to {MAX_SEQUENCES}"
        require(1 <= asked.num_sequences <= MAX_SEQUENCES, _PATH + "num_sequences", rule)
    _check_biases(asked, vocab_size)
    field = _PATH + "allowed_token_ids"
    count = len(asked.allowed_token_ids)
    require(count <= vocab_size, field, "has more entries than ids exist")
    check_token_ids(asked.allowed_token_ids, vocab_size, field)


def to_sampling(asked: pb.SamplingParams, defaults: pb.SamplingParams, vocab_size: int) -> Sampling:
    """Return checked parameters, the rest from the defaults; without a seed, with any."""
    merged = pb.SamplingParams()
    merged.CopyFrom(defaults)
    merged.MergeFrom(asked)
    biased = sorted(merged.logit_bias)
    return Sampling(
        temperature=0.0 if merged.temperature < _MIN_TEMPERATURE else merged.temperature,
        top_k=merged.top_k if merged.top_k < vocab_size else 0,
        top_p=merged.top_p,
        min_p=merged.min_p,
        repetition_penalty=merged.repetition_penalty,
        presence_penalty=merged.presence_penalty,
        frequency_penalty=merged.frequency_penalty,
        bias_token_ids=biased,
        biases=[merged.logit_bias[token_id] for token_id in biased],
        allowed_token_ids=merged.allowed_token_ids,
        seed=merged.seed if merged.HasField("seed") else secrets.randbits(64),
    )


def check_token_ids(ids: Sequence[int], vocab_size: int, field: str) -> None:
    """Raise RequestError for an id outside of the vocabulary."""
    require(
        max(ids, default=0) < vocab_size,
        field,
        f"has an id out of range: the model has {vocab_size} ids",
    )


def require(condition: bool, field: str, rule: str) -> None:
    """Raise RequestError, INVALID_FIELD, unless the condition holds. rule: as in "is missing"."""
    if not condition:
        name = field.rsplit(".", 1)[-1]
        raise RequestError(Reason.INVALID_FIELD, f"{name} {rule}", field=field)


def _check_biases(asked: pb.SamplingParams, vocab_size: int) -> None:
    field = _PATH + "logit_bias"
    count = len(asked.logit_bias)
    require(count <= MAX_BIASES, field, f"has {count} entries; at most {MAX_BIASES} are taken")
    check_token_ids(list(asked.logit_bias), vocab_size, field)
    for token_id, bias in asked.logit_bias.items():
        rule = f"must be from {-_MAX_BIAS:g} to {_MAX_BIAS:g}"
        require(-_MAX_BIAS <= bias <= _MAX_BIAS, f"{field}[{token_id}]", rule)
