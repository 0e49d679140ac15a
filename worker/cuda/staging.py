"""A step command as the integers that the device reads.

Owns the way from protobuf to kernels/step.py's input. Does not touch the device.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import add
from typing import NamedTuple

from mili.internal.v1.step_pb2 import Admission, Sampling, StepCommand
from mili.kernels.sampling import Edit
from mili.kernels.step import (
    ADMISSION,
    ADMISSION_SIZE,
    COUNTS,
    ROWS,
    SAMPLES,
    SIZES,
    STARTS,
)
from mili.worker.sequence_table import TOKEN_BYTES

_MAX_INT = 2**31 - 1
# Plain ints: an IntFlag's operators take as long as all else that an admission costs.
_REPETITION, _OUTPUT, _BIASES, _ALLOWED, _SUPPRESSED = map(int, Edit)
_NO_EDITS = (0.0, 0.0, 0.0, 0, 0, 0, 0)


class StepRows(NamedTuple):
    """A command's rows in the order in which they are computed: first those of one new token.

    order: where each stands in the command. ends: computed tokens after this step. samples: whether
    its known tokens are all computed then, so that it gives the next one.
    """

    order: Sequence[int]
    rows: list[int]
    starts: list[int]
    counts: list[int]
    ends: list[int]
    samples: list[bool]
    num_tokens: int
    num_decode_rows: int
    num_samples: int


def order_rows(
    rows: list[int], starts: list[int], counts: list[int], num_known: Sequence[int]
) -> StepRows:
    """rows, starts, counts: as commanded; num_known: [table_rows]."""
    order: Sequence[int] = range(len(rows))
    num_decode_rows = counts.count(1)
    if num_decode_rows < len(rows):
        order = sorted(order, key=lambda index: counts[index] > 1)
        rows, starts, counts = ([column[i] for i in order] for column in (rows, starts, counts))
    ends = list(map(add, starts, counts))
    samples = [end == num_known[row] for row, end in zip(rows, ends, strict=True)]
    return StepRows(
        order, rows, starts, counts, ends, samples, sum(counts), num_decode_rows, sum(samples)
    )


def pack_rows(step: StepRows, command: StepCommand, num_appended: int, target: memoryview) -> None:
    """Write the sizes and the columns of the input, target[:DELTAS], int32."""
    num_rows = len(step.rows)
    sizes = (step.num_tokens, num_rows, step.num_decode_rows, len(command.admissions), num_appended)
    for at, column in (
        (SIZES, sizes),
        (ROWS, step.rows),
        (STARTS, step.starts),
        (COUNTS, step.counts),
        (SAMPLES, step.samples),
    ):
        target[at : at + len(column)] = array("i", column)


def pack_deltas(command: StepCommand, appended: Sequence[int]) -> bytes:
    """What stands behind the columns. appended: row, index and id of each appended block."""
    parts = [b""] * len(command.admissions) + [array("i", appended).tobytes()]
    end = ADMISSION_SIZE * len(command.admissions) + len(appended)
    for index, admission in enumerate(command.admissions):
        edits = _edits(admission.sampling) | (_ALLOWED if admission.grammar else 0)
        parts[index] = _record(admission, end, edits)
        parts.append(admission.token_ids)
        end += len(admission.token_ids) // TOKEN_BYTES
        if edits:
            lists = _lists(admission.sampling)
            parts.append(lists)
            end += len(lists) // TOKEN_BYTES
    return b"".join(parts)


def _edits(sampling: Sampling) -> int:
    """What changes the row's logits: its columns alone are written, and may be read."""
    edits = 0
    if sampling.repetition_penalty not in (0, 1):
        edits |= _REPETITION
    if sampling.presence_penalty or sampling.frequency_penalty:
        edits |= _OUTPUT
    if sampling.bias_token_ids:
        edits |= _BIASES
    if sampling.allowed_token_ids:
        edits |= _ALLOWED
    if sampling.suppressed_token_ids:
        edits |= _SUPPRESSED
    return edits


def _record(admission: Admission, tokens_at: int, edits: int) -> bytes:
    sampling = admission.sampling
    return ADMISSION.pack(
        admission.row,
        len(admission.token_ids) // TOKEN_BYTES,
        admission.num_prompt_tokens,
        tokens_at,
        sampling.temperature,
        min(sampling.top_k, _MAX_INT),
        sampling.top_p,
        sampling.min_p,
        sampling.seed,
        edits,
        *(_edit_fields(sampling) if edits else _NO_EDITS),
    )


def _edit_fields(sampling: Sampling) -> tuple[float, ...]:
    return (
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        min(sampling.suppress_until_position, _MAX_INT),
        len(sampling.suppressed_token_ids),
        len(sampling.allowed_token_ids),
        len(sampling.bias_token_ids),
    )


def _lists(sampling: Sampling) -> bytes:
    """The token ids and biases that an admission's record counts, as they stand one by one."""
    # A slice is a list, which is read several times faster: it may have the whole vocabulary.
    suppressed, allowed = sampling.suppressed_token_ids[:], sampling.allowed_token_ids[:]
    token_ids = array("i", suppressed + allowed + sampling.bias_token_ids[:])
    return token_ids.tobytes() + array("f", sampling.biases).tobytes()
