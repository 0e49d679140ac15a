"""A command's integers, read back the plain way."""

from __future__ import annotations

import struct

import numpy as np
import pytest

pytest.importorskip("cupy")  # which the layout's module imports for its kernels

from mili.internal.v1.step_pb2 import Admission, Sampling, StepCommand
from mili.kernels.sampling import Edit
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
            presence_penalty=-0.5,
            frequency_penalty=1.75,
            bias_token_ids=[4, 9, 2**31 - 1],
            biases=[-100, 0.1, 7],
            allowed_token_ids=[8, 1, 8],
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
    "row", "num_tokens", "num_prompt_tokens", "tokens_at", "temperature", "top_k", "top_p", "min_p",
    "seed_low", "seed_high", "edits", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "suppress_until", "num_suppressed", "num_allowed", "num_biases",
)  # fmt: skip
FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
          "frequency_penalty")  # fmt: skip


def read_float(bits: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<i", bits))[0]
    return value


def test_admissions_and_blocks_stand_where_the_record_says() -> None:
    command = StepCommand(
        admissions=[
            Admission(
                row=row,
                token_ids=np.array(ids, "<u4").tobytes(),
                num_prompt_tokens=len(ids) // 2,
                sampling=sampling,
            )
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
        assert (record["row"], record["num_tokens"]) == (row, len(ids))
        assert record["num_prompt_tokens"] == len(ids) // 2
        end = record["tokens_at"]
        biases = [struct.unpack("<i", struct.pack("<f", bias))[0] for bias in sampling.biases]
        assert record["num_suppressed"] == len(sampling.suppressed_token_ids)
        assert record["num_allowed"] == len(sampling.allowed_token_ids)
        assert record["num_biases"] == len(biases)
        for expected in (
            ids,
            sampling.suppressed_token_ids,
            sampling.allowed_token_ids,
            sampling.bias_token_ids,
            biases,
        ):
            assert deltas[end : end + len(expected)] == list(expected)
            used += range(end, end := end + len(expected))
        for name in FLOATS:
            assert read_float(record[name]) == getattr(sampling, name), name
        assert record["top_k"] == min(sampling.top_k, 2**31 - 1)
        assert record["suppress_until"] == min(sampling.suppress_until_position, 2**31 - 1)
        seed = record["seed_low"] % 2**32 + (record["seed_high"] % 2**32 << 32)
        assert seed == sampling.seed
    assert sorted(used) == list(range(len(deltas))), "something overlaps, or is for nobody"


def test_a_step_without_news_has_no_deltas() -> None:
    assert pack_deltas(StepCommand(), []) == b""


@pytest.mark.parametrize(
    ("sampling", "edits"),
    [
        (Sampling(), 0),
        (Sampling(repetition_penalty=1, temperature=1, top_k=5, top_p=0.5, min_p=0.1, seed=3), 0),
        (Sampling(suppress_until_position=12), 0),
        (Sampling(repetition_penalty=1.5), Edit.REPETITION),
        (Sampling(presence_penalty=-1), Edit.OUTPUT),
        (Sampling(frequency_penalty=1), Edit.OUTPUT),
        (Sampling(bias_token_ids=[0], biases=[0]), Edit.BIASES),
        (Sampling(allowed_token_ids=[0]), Edit.ALLOWED),
        (Sampling(suppressed_token_ids=[0]), Edit.SUPPRESSED),
        (ADMITTED[3][1], 31),
    ],
)
def test_the_columns_of_an_edit_are_read_only_where_it_is_named(
    sampling: Sampling, edits: int
) -> None:
    """What a row does not use is left as it was: old values must not be read."""
    admission = Admission(row=1, token_ids=b"\1\0\0\0", sampling=sampling)
    packed = np.frombuffer(pack_deltas(StepCommand(admissions=[admission]), []), np.int32)
    assert packed[FIELDS.index("edits")] == edits
