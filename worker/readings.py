"""What a row is asked for beside tokens, and what of that a step has to read.

Owns which positions are due when. Does not know how they are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mili.internal.v1.step_pb2 import Admission, Logprobs, Task
from mili.kernels.reference_logprobs import LogprobColumns

# Columns of a position at most: its own token, and 20 alternatives.
MAX_WIDTH = 21


class Wanted(NamedTuple):
    """Of one row. Widths count a position's own token; 0 means nothing is wanted."""

    generates: bool
    embeds: bool
    sampled_width: int
    # Of the tokens that the row was admitted with.
    scored: range
    scored_width: int


class Piece(NamedTuple):
    """Positions of one row whose log-probabilities a step reads.

    place: where the row stands among the step's rows. Each position is read where the one before
    it is computed: offset is where that of the first is among the row's new tokens.
    """

    place: int
    row: int
    positions: range
    offset: int
    width: int


def wanted_of(admission: Admission) -> Wanted | None:
    """What an admission asks for; None where it is tokens alone, as nearly always."""
    generates = admission.task in (Task.TASK_UNSPECIFIED, Task.TASK_GENERATE)
    reads_sampled = generates and admission.HasField("num_logprobs")
    reads_known = admission.HasField("score_from")
    if generates and not reads_sampled and not reads_known:
        return None
    num_tokens = len(admission.token_ids) // 4
    return Wanted(
        generates=generates,
        embeds=admission.task == Task.TASK_EMBED,
        sampled_width=1 + admission.num_logprobs if reads_sampled else 0,
        scored=range(admission.score_from, num_tokens) if reads_known else range(0),
        scored_width=1 + admission.num_scored_alternatives,
    )


def scored_pieces(
    wanted: Mapping[int, Wanted], rows: Sequence[int], starts: Sequence[int], ends: Sequence[int]
) -> list[Piece]:
    """What a step that computes starts[i] to ends[i] - 1 of rows[i] reads of known tokens."""
    pieces = []
    for place, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True)):
        if of_row := wanted.get(row):
            scored = of_row.scored
            positions = range(max(scored.start, start + 1), min(scored.stop, end + 1))
            if positions:
                offset = positions.start - 1 - start
                pieces.append(Piece(place, row, positions, offset, of_row.scored_width))
    return pieces


def portions(pieces: Sequence[Piece], room: int) -> list[list[Piece]]:
    """Return the same positions in the same order, `room` at a time."""
    result: list[list[Piece]] = []
    free = 0
    for piece in pieces:
        left = piece
        while left.positions:
            if not free:
                result.append([])
                free = room
            count = min(free, len(left.positions))
            result[-1].append(left._replace(positions=left.positions[:count]))
            left = left._replace(positions=left.positions[count:], offset=left.offset + count)
            free -= count
    return result


def to_message(index: int, first_position: int, columns: LogprobColumns) -> Logprobs:
    """columns: [positions, width], on the host."""
    token_ids, logprobs, ranks = (column.numpy() for column in columns)
    return to_logprobs(index, first_position, token_ids, logprobs, ranks)


def to_logprobs(
    index: int,
    first_position: int,
    token_ids: npt.NDArray[np.int32],
    logprobs: npt.NDArray[np.float32],
    ranks: npt.NDArray[np.int32],
) -> Logprobs:
    """The arrays are [positions, width]."""
    return Logprobs(
        index=index,
        first_position=first_position,
        width=token_ids.shape[1],
        token_ids=token_ids.astype("<u4").tobytes(),
        logprobs=logprobs.astype("<f4").tobytes(),
        ranks=ranks.astype("<u4").tobytes(),
    )
