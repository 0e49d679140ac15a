"""Log-probabilities as the messages of the wire.

Owns their shape and the size of a piece. Does not know when they are sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mili.router.errors import Reason, RequestError
from mili.router.readings import Readings, TokenLogprobs
from mili.v1 import inference_pb2 as pb

# Positions in one message.
_PIECE = 1024
# Of one token at one position: id and rank of up to three bytes, a float of four.
_COLUMN_BYTES = 10
# Of the 4 MiB that a client takes by default the rest is for the text.
_MAX_WHOLE_BYTES = 3 * 1024 * 1024


def output_logprobs(
    readings: Sequence[Readings], token_bytes: Callable[[int], bytes]
) -> Iterator[pb.TokenLogprob]:
    """Yield one message for each output token; token_bytes: what an id spells."""
    for reading in readings:
        for piece in reading.sampled:
            for start in range(0, len(piece.token_ids), piece.width):
                own = _token(piece, start, token_bytes)
                alternatives = range(start + 1, start + piece.width)
                own.top.extend(_token(piece, column, token_bytes) for column in alternatives)
                yield own


def prompt_pieces(readings: Sequence[Readings]) -> Iterator[pb.PromptLogprobs]:
    """Yield what there is of the prompt, in order, a limited number of positions in each."""
    for reading in readings:
        for scored in reading.scored:
            for first in range(0, scored.num_positions, _PIECE):
                yield _columns(scored.part(first, _PIECE))


def prompt_logprobs(readings: Sequence[Readings]) -> pb.PromptLogprobs | None:
    """Return all that there is of the prompt in one message; None where there is nothing."""
    whole: pb.PromptLogprobs | None = None
    for reading in readings:
        for scored in reading.scored:
            piece = _columns(scored)
            if whole is None:
                whole = piece
                continue
            assert piece.first_position == whole.first_position + len(whole.ranks) // whole.width
            whole.token_ids.extend(piece.token_ids)
            whole.logprobs.extend(piece.logprobs)
            whole.ranks.extend(piece.ranks)
    return whole


def check_fits_whole(options: pb.OutputOptions, prompt_tokens: int) -> None:
    """Raise RequestError where one message would not hold a prompt's log-probabilities."""
    if not options.HasField("prompt_top_logprobs"):
        return
    width = 1 + options.prompt_top_logprobs
    count = (prompt_tokens - 1) * width * _COLUMN_BYTES
    if count > _MAX_WHOLE_BYTES:
        fit = 1 + _MAX_WHOLE_BYTES // (width * _COLUMN_BYTES)
        raise RequestError(
            Reason.INVALID_FIELD,
            f"the log-probabilities of {prompt_tokens} prompt tokens do not fit one message, those"
            f" of {fit} do: use GenerateStream",
            field="generation.output.prompt_top_logprobs",
        )


def _columns(piece: TokenLogprobs) -> pb.PromptLogprobs:
    return pb.PromptLogprobs(
        first_position=piece.first_position,
        width=piece.width,
        token_ids=piece.token_ids,
        logprobs=piece.logprobs,
        ranks=piece.ranks,
    )


def _token(
    piece: TokenLogprobs, column: int, token_bytes: Callable[[int], bytes]
) -> pb.TokenLogprob:
    token_id = piece.token_ids[column]
    return pb.TokenLogprob(
        token_id=token_id,
        token=token_bytes(token_id),
        logprob=piece.logprobs[column],
        rank=piece.ranks[column],
    )
