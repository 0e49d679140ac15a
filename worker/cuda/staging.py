"""A step command as the integers that the device reads.

Owns the way from protobuf to kernels/step.py's input. Does not touch the device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mili.internal.v1.step_pb2 import Admission, StepCommand
from mili.kernels.step import (
    ADMISSION_FIELDS,
    ADMISSION_SIZE,
    COUNTS,
    DELTAS,
    ROWS,
    SAMPLES,
    SIZES,
    STARTS,
)
from mili.worker.sequence_table import IntArray

Int32Array = npt.NDArray[np.int32]


class StepRows(NamedTuple):
    """A command's rows in the order in which they are computed: first those of one new token.

    order: where each stands in the command. samples: whether its known tokens are all computed
    after this step, so that it gives the next one.
    """

    order: IntArray  # [rows]
    rows: IntArray  # [rows]
    starts: IntArray  # [rows]
    counts: IntArray  # [rows]
    samples: npt.NDArray[np.bool_]  # [rows]

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def num_decode_rows(self) -> int:
        return int(np.count_nonzero(self.counts == 1))


def order_rows(rows: IntArray, starts: IntArray, counts: IntArray, num_known: IntArray) -> StepRows:
    """rows, starts, counts: [rows] as commanded; num_known: [table_rows]."""
    order = np.argsort(counts > 1, kind="stable")
    rows, starts, counts = rows[order], starts[order], counts[order]
    return StepRows(order, rows, starts, counts, starts + counts == num_known[rows])


def pack_rows(step: StepRows, target: Int32Array) -> None:
    """Write the fixed columns of the input, target[:DELTAS]."""
    num_rows = len(step.rows)
    target[SIZES : SIZES + 3] = step.num_tokens, num_rows, step.num_decode_rows
    for at, column in (
        (ROWS, step.rows),
        (STARTS, step.starts),
        (COUNTS, step.counts),
        (SAMPLES, step.samples),
    ):
        target[at : at + num_rows] = column


class Deltas(NamedTuple):
    """What `apply_deltas` reads, to stand at DELTAS in the input."""

    values: Int32Array
    num_admissions: int
    admissions_at: int
    num_appended: int
    appended_at: int


def pack_deltas(command: StepCommand, appended: Int32Array, at: int = DELTAS) -> Deltas:
    """appended: [blocks, 3], row, index and id of each. at: where in the input they will stand."""
    num_admissions = len(command.admissions)
    records = np.zeros((num_admissions, ADMISSION_SIZE), np.int32)
    parts: list[Int32Array] = [records.reshape(-1), appended.reshape(-1)]
    end = at + sum(len(part) for part in parts)
    for record, admission in zip(records, command.admissions, strict=True):
        tokens = np.frombuffer(admission.token_ids, "<i4")
        suppressed = np.array(admission.sampling.suppressed_token_ids, np.int32)
        record[: len(ADMISSION_FIELDS)] = _fields(admission, len(tokens), end, len(suppressed))
        parts += [tokens, suppressed]
        end += len(tokens) + len(suppressed)
    return Deltas(
        np.concatenate(parts),
        num_admissions,
        at,
        len(appended),
        at + num_admissions * ADMISSION_SIZE,
    )


def _fields(
    admission: Admission, num_tokens: int, tokens_at: int, num_suppressed: int
) -> tuple[int, ...]:
    """In the order of ADMISSION_FIELDS."""
    sampling = admission.sampling
    floats = np.array(
        [sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty],
        np.float32,
    )
    temperature, top_p, min_p, repetition_penalty = floats.view(np.int32).tolist()
    seed_low, seed_high = np.array([sampling.seed], np.uint64).view(np.int32).tolist()
    return (
        admission.row,
        num_tokens,
        tokens_at,
        temperature,
        min(sampling.top_k, 2**31 - 1),
        top_p,
        min_p,
        repetition_penalty,
        seed_low,
        seed_high,
        # Without ids the row's bits are left as they were, and must not be read.
        min(sampling.suppress_until_position, 2**31 - 1) if num_suppressed else 0,
        num_suppressed,
        tokens_at + num_tokens,
    )
