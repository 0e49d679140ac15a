"""Response messages in, Python values out.

Owns which field becomes what. The folding of a stream's events is partial.py's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration

from mili.client.errors import MiliError, from_message
from mili.client.options import ToolCall
from mili.client.results import (
    Embeddings,
    Generation,
    Score,
    Scores,
    Sequence,
    Timing,
    TokenLogprob,
    Usage,
)
from mili.v1 import embedding_pb2
from mili.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from pydantic import BaseModel


def from_response(
    response: pb.GenerateResponse, response_model: type[BaseModel] | None = None
) -> Generation:
    """Raises MiliError if every sequence failed."""
    return whole(
        Generation(
            sequences=tuple(map(_sequence, response.sequences)),
            usage=to_usage(response.usage),
            timing=to_timing(response.timing),
            seed=response.seed,
            model=response.model,
            model_revision=response.model_revision,
            request_id=response.request_id,
            prompt_logprobs=to_prompt_logprobs(response.prompt_logprobs),
            response_model=response_model,
        )
    )


def whole(generation: Generation) -> Generation:
    """Return it. Raises MiliError if every sequence failed."""
    errors = [sequence.error for sequence in generation.sequences if sequence.error is not None]
    if errors and len(errors) == len(generation.sequences):
        raise errors[0]
    return generation


def from_embed_response(response: embedding_pb2.EmbedResponse) -> Embeddings:
    vectors = tuple(tuple(embedding.values) for embedding in response.embeddings)
    return Embeddings(vectors, to_usage(response.usage))


def from_score_response(response: embedding_pb2.ScoreResponse) -> Scores:
    scores = (Score(s.logprob, s.num_tokens, s.is_greedy) for s in response.scores)
    return Scores(tuple(scores), to_usage(response.usage))


def _sequence(sequence: pb.GeneratedSequence) -> Sequence:
    return Sequence(
        text=sequence.text,
        token_ids=tuple(sequence.token_ids),
        finish_reason=reason_name(sequence.finish_reason),
        matched=to_matched(sequence),
        reasoning=sequence.reasoning_text,
        tool_calls=tuple(
            ToolCall(call.id, call.name, call.arguments_json) for call in sequence.tool_calls
        ),
        logprobs=tuple(map(to_logprob, sequence.logprobs.tokens)),
        error=to_error(sequence),
    )


def to_error(message: pb.Finished | pb.GeneratedSequence) -> MiliError | None:
    failed = message.finish_reason == pb.FINISH_REASON_ERROR
    return from_message(message.error) if failed else None


def reason_name(reason: pb.FinishReason.ValueType) -> str:
    return pb.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()


def to_matched(message: pb.Finished | pb.GeneratedSequence) -> str | int | None:
    match message.WhichOneof("matched"):
        case "stop_sequence":
            return message.stop_sequence
        case "stop_token_id":
            return message.stop_token_id
    return None


def to_logprob(message: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(
        token_id=message.token_id,
        token=message.token,
        logprob=message.logprob,
        rank=message.rank,
        top=tuple(map(to_logprob, message.top)),
    )


def to_prompt_logprobs(piece: pb.PromptLogprobs) -> tuple[TokenLogprob, ...]:
    """The positions of one piece: each has `width` columns, of which the first is its token."""
    columns = zip(piece.token_ids, piece.logprobs, piece.ranks, strict=True)
    cells = [TokenLogprob(token_id, b"", logprob, rank) for token_id, logprob, rank in columns]
    return tuple(
        cells[start]._replace(top=tuple(cells[start + 1 : start + piece.width]))
        for start in range(0, len(cells), max(1, piece.width))
    )


def to_usage(usage: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        completion_tokens=usage.completion_tokens,
        recomputed_tokens=usage.recomputed_tokens,
        reasoning_tokens=usage.reasoning_tokens,
    )


def to_timing(timing: pb.Timing) -> Timing:
    return Timing(
        queue=_seconds(timing.queue),
        prefill=_seconds(timing.prefill),
        time_to_first_token=_seconds(timing.time_to_first_token),
        decode=_seconds(timing.decode),
        total=_seconds(timing.total),
        preemptions=timing.preemptions,
        recoveries=timing.recoveries,
        worker=timing.worker,
    )


def _seconds(duration: Duration) -> float:
    return duration.ToTimedelta().total_seconds()
