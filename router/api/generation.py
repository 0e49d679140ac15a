"""A Generation message as GenerationParams: every value checked, every default filled in.

Owns the rules for the values. Does not know how prompts become tokens, or who runs the request.
"""

from __future__ import annotations

from typing import NamedTuple

from mili.hub.folder import ModelFolder
from mili.internal.v1.step_pb2 import Sampling
from mili.router.api.parsing import check_parsing
from mili.router.api.sampling import (
    check_sampling,
    check_token_ids,
    read_sampling_defaults,
    require,
    to_sampling,
)
from mili.router.api.structured import check_structured_output
from mili.router.errors import Reason, RequestError
from mili.router.params import Constraint, GenerationParams, Scheduling
from mili.router.parsers.formats import Formats
from mili.router.readings import MAX_ALTERNATIVES
from mili.v1 import inference_pb2 as pb

_MAX_STOP_SEQUENCES = 64
_MAX_STOP_SEQUENCE_BYTES = 1024


class Defaults(NamedTuple):
    """What a model uses where the caller says nothing."""

    sampling: pb.SamplingParams
    eos_token_ids: frozenset[int]
    vocab_size: int
    formats: Formats = Formats()


def read_defaults(folder: ModelFolder) -> Defaults:
    """Return a model's defaults; raise ValueError where its generation_config.json has bad ones."""
    eos_token_ids = frozenset(folder.generation.eos_token_ids)
    return Defaults(read_sampling_defaults(folder), eos_token_ids, folder.vocab_size)


def check_generation(generation: pb.Generation, context_limit: int, defaults: Defaults) -> None:
    """Raise RequestError for a bad value, before any work that grows with the prompt."""
    check_sampling(generation.sampling, defaults.vocab_size)
    _check_stopping(generation.stopping, defaults.vocab_size)
    check_parsing(generation, defaults.formats)
    _check_output(generation.output, defaults.vocab_size)
    check_structured_output(generation)
    kind = generation.WhichOneof("prompt")
    require(kind is not None, "generation.prompt", "is missing")
    require(kind != "text" or bool(generation.text), "generation.text", "is empty")
    require(
        kind == "text" or not generation.add_special_tokens,
        "generation.add_special_tokens",
        "is for text prompts only",
    )
    if generation.HasField("truncate_prompt_tokens"):
        require(
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
    constraint: Constraint | None = None,
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
    sampling = to_sampling(generation.sampling, defaults.sampling, defaults.vocab_size)
    if min_tokens:
        _suppress(sampling, eos | stop_ids, until=len(prompt) + min_tokens)
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
        parse_reasoning=output.parse_reasoning,
        parse_tool_calls=output.parse_tool_calls,
        max_reasoning_tokens=(
            stopping.max_reasoning_tokens if stopping.HasField("max_reasoning_tokens") else None
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
        constraint=constraint,
    )


def _suppress(sampling: Sampling, token_ids: frozenset[int], *, until: int) -> None:
    """Let none of the tokens be drawn before a position; raise RequestError if none is left."""
    allowed = sampling.allowed_token_ids
    require(
        not allowed or any(token_id not in token_ids for token_id in allowed),
        "generation.stopping.min_tokens",
        "asks for tokens, and all of allowed_token_ids would end the output",
    )
    sampling.suppressed_token_ids.extend(sorted(token_ids))
    sampling.suppress_until_position = until


def check_length(count: int, field: str, context_limit: int) -> None:
    """Raise RequestError for a prompt without tokens, or of more than fit."""
    require(count > 0, field, "is empty")
    if count >= context_limit:
        raise RequestError(
            Reason.CONTEXT_TOO_LONG,
            f"the prompt has {count} tokens, and at most {context_limit - 1} fit: prompt and"
            f" output together may have {context_limit}",
            field=field,
        )


def _check_stopping(asked: pb.StopConditions, vocab_size: int) -> None:
    path = "generation.stopping."
    if asked.HasField("max_tokens"):
        require(asked.max_tokens >= 1, path + "max_tokens", "must be at least 1")
        require(
            asked.min_tokens <= asked.max_tokens, path + "min_tokens", "must not pass max_tokens"
        )
    require(
        len(asked.stop_sequences) <= _MAX_STOP_SEQUENCES,
        path + "stop_sequences",
        f"has {len(asked.stop_sequences)} entries; at most {_MAX_STOP_SEQUENCES} are taken",
    )
    for index, text in enumerate(asked.stop_sequences):
        require(
            1 <= len(text.encode()) <= _MAX_STOP_SEQUENCE_BYTES,
            f"{path}stop_sequences[{index}]",
            f"must have from 1 to {_MAX_STOP_SEQUENCE_BYTES} bytes",
        )
    field = path + "stop_token_ids"
    require(len(asked.stop_token_ids) <= vocab_size, field, "has more entries than ids exist")
    check_token_ids(asked.stop_token_ids, vocab_size, field)


def _check_output(asked: pb.OutputOptions, vocab_size: int) -> None:
    most = min(MAX_ALTERNATIVES, vocab_size)
    for name in ("top_logprobs", "prompt_top_logprobs"):
        require(getattr(asked, name) <= most, f"generation.output.{name}", f"is at most {most}")
