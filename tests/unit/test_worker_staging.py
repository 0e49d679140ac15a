"""A command's integers, read back the plain way."""

from __future__ import annotations

import struct

import numpy as np
import pytest

pytest.importorskip("cupy")  # which the layout's module imports for its kernels

from mili.internal.v1.step_pb2 import Admission, Sampling, StepCommand
from mili.kernels.step import (
    ADMISSION_SIZE,
    COUNTS,
    DELTAS,
    MAX_ROWS,
    ROWS,
    SAMPLES,
    SIZES,
    STARTS,
)
from mili.worker.cuda.staging import StepRows, order_rows, pack_deltas, pack_rows

UNTOUCHED = -77


def step_rows(commanded: list[tuple[int, int, int]], known: dict[int, int]) -> StepRows:
    """commanded: row, start and count of each; known: tokens of each row."""
    rows, starts, counts = ([each[i] for each in commanded] for i in range(3))
    num_known = [0] * (MAX_ROWS + 1)
    for row, tokens in known.items():
        num_known[row] = tokens
    return order_rows(rows, starts, counts, num_known)


COMMANDED = [(9, 0, 5), (4, 30, 1), (7, 10, 2), (2, 3, 1), (5, 0, 128)]
KNOWN = {9: 5, 4: 31, 7: 40, 2: 9, 5: 128}


def test_rows_of_one_token_come_first_and_else_keep_their_order() -> None:
    step = step_rows(COMMANDED, KNOWN)
    assert step.order == [1, 3, 0, 2, 4]
    columns = zip(step.rows, step.starts, step.counts, strict=True)
    assert list(columns) == [COMMANDED[i] for i in step.order]
    assert step.ends == [31, 4, 5, 12, 128]
    # Rows 2 and 7 know more than this step computes: a prompt in chunks gives no token yet.
    assert step.samples == [True, False, True, False, True]
    assert (step.num_tokens, step.num_decode_rows, step.num_samples) == (137, 2, 3)


def test_sizes_and_columns() -> None:
    target = np.full(DELTAS, UNTOUCHED, np.int32)
    command = StepCommand(admissions=[Admission(row=9), Admission(row=5)])
    pack_rows(step_rows(COMMANDED, KNOWN), command, 11, target.data)
    assert target[SIZES : SIZES + 5].tolist() == [137, 5, 2, 2, 11]
    for at, column in (
        (ROWS, [4, 2, 9, 7, 5]),
        (STARTS, [30, 3, 0, 10, 0]),
        (COUNTS, [1, 1, 5, 2, 128]),
        (SAMPLES, [1, 0, 1, 0, 1]),
    ):
        assert target[at : at + 5].tolist() == column
        assert (target[at + 5 : at + MAX_ROWS] == UNTOUCHED).all()


@pytest.mark.parametrize("num_rows", [0, MAX_ROWS])
def test_no_rows_and_as_many_as_there_may_be(num_rows: int) -> None:
    target = np.full(DELTAS, UNTOUCHED, np.int32)
    rows = [(row, row, 1) for row in range(1, num_rows + 1)]
    pack_rows(step_rows(rows, {}), StepCommand(), 0, target.data)
    assert target[SIZES : SIZES + 5].tolist() == [num_rows] * 3 + [0, 0]
    assert target[ROWS : ROWS + num_rows].tolist() == list(range(1, num_rows + 1))
    assert target[SAMPLES : SAMPLES + num_rows].tolist() == [0] * num_rows


ADMITTED = {
    3: (
        [7, 0, 2**31 - 1],
        Sampling(
            temperature=0.7,
            top_k=40,
            top_p=0.9,
            min_p=0.05,
            repetition_penalty=1.3,
            seed=2**64 - 3,
            suppressed_token_ids=[5, 6],
            suppress_until_position=17,
        ),
    ),
    8: (
        [1],
        Sampling(
            top_k=2**32 - 1,
            suppress_until_position=2**32 - 1,
            suppressed_token_ids=[3],
            seed=2**32 + 9,
        ),
    ),
    1: (list(range(500)), Sampling(suppressed_token_ids=[0])),
}


# As kernels/cuda/step.cu has them.
FIELDS = (
    "row", "num_tokens", "tokens_at", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "seed_low", "seed_high", "suppress_until", "num_suppressed",
    "suppressed_at",
)  # fmt: skip


def read_float(bits: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<i", bits))[0]
    return value


def test_admissions_and_blocks_stand_where_the_record_says() -> None:
    command = StepCommand(
        admissions=[
            Admission(row=row, token_ids=np.array(ids, "<u4").tobytes(), sampling=sampling)
            for row, (ids, sampling) in ADMITTED.items()
        ]
    )
    appended = [3, 0, 11, 3, 1, 12, 1, 0, 13]
    deltas = np.frombuffer(pack_deltas(command, appended), np.int32).tolist()
    appended_at = len(ADMITTED) * ADMISSION_SIZE
    assert deltas[appended_at : appended_at + 9] == appended
    used = [*range(appended_at + 9)]
    for index, (row, (ids, sampling)) in enumerate(ADMITTED.items()):
        record = dict(zip(FIELDS, deltas[index * ADMISSION_SIZE :], strict=False))
        tokens_at, suppressed_at = record["tokens_at"], record["suppressed_at"]
        suppressed = list(sampling.suppressed_token_ids)
        assert (record["row"], record["num_tokens"]) == (row, len(ids))
        assert deltas[tokens_at : tokens_at + len(ids)] == ids
        assert record["num_suppressed"] == len(suppressed)
        assert deltas[suppressed_at : suppressed_at + len(suppressed)] == suppressed
        used += range(tokens_at, tokens_at + len(ids))
        used += range(suppressed_at, suppressed_at + len(suppressed))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            assert read_float(record[name]) == getattr(sampling, name), name
        assert record["top_k"] == min(sampling.top_k, 2**31 - 1)
        assert record["suppress_until"] == min(sampling.suppress_until_position, 2**31 - 1)
        seed = record["seed_low"] % 2**32 + (record["seed_high"] % 2**32 << 32)
        assert seed == sampling.seed
    assert sorted(used) == list(range(len(deltas))), "something overlaps, or is for nobody"


def test_a_step_without_news_has_no_deltas() -> None:
    assert pack_deltas(StepCommand(), []) == b""


def test_without_ids_nothing_is_suppressed() -> None:
    """The bits of a row are written only where there are ids: old ones must not be read."""
    admission = Admission(
        row=1, token_ids=b"\1\0\0\0", sampling=Sampling(suppress_until_position=12)
    )
    packed = np.frombuffer(pack_deltas(StepCommand(admissions=[admission]), []), np.int32)
    assert packed[FIELDS.index("suppress_until")] == 0
